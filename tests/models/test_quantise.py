import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_avatar.models.dit import DiT
from jax_avatar.models.network import Network, flatten
from jax_avatar.models.quantise import QuantisedLinear, quantise, quantise_params, quantised_leaves
from jax_avatar.streaming.plan import StreamPlan
from jax_avatar.streaming.sampler import SequentialStream
from jax_avatar.testing import NANO, make_audio, make_conditions, make_network

KINDS = ["int8", "fp8"]


@pytest.mark.parametrize(("kind", "step"), [("int8", 1 / 254), ("fp8", 1 / 16)])
def test_rounding_errs_by_half_a_step_of_the_largest_value(kind, step):
    array = jax.random.normal(jax.random.key(0), (64, 32)) * 10.0 ** jnp.arange(32)[None]
    values, scale = quantise(array, kind, axis=0)
    assert values.dtype.itemsize == 1 and scale.shape == (1, 32)
    error = jnp.abs(values.astype(jnp.float32) * scale - array)
    assert (error <= step * jnp.abs(array).max(0, keepdims=True) * 1.001).all()


@pytest.mark.parametrize("kind", KINDS)
def test_zeros_stay_zeros_and_large_values_stay_finite(kind):
    array = jnp.stack([jnp.zeros(8), jnp.full(8, 3e38)])
    values, scale = quantise(array, kind, axis=1)
    again = values.astype(jnp.float32) * scale
    np.testing.assert_array_equal(again[0], 0)
    assert jnp.isfinite(again).all()


@pytest.mark.parametrize("kind", KINDS)
def test_a_product_is_near_the_exact_one(kind):
    keys = jax.random.split(jax.random.key(1), 3)
    x, kernel = jax.random.normal(keys[0], (2, 5, 64)), jax.random.normal(keys[1], (64, 48))
    layer = QuantisedLinear(NANO.replace(weights=kind), 64, 48)
    values, scale = quantise(kernel, kind, axis=0)
    bias = jax.random.normal(keys[2], (48,))
    for name, value in (("kernel", values), ("kernel_scale", scale[0]), ("bias", bias)):
        getattr(layer, name).set_value(value)
    exact = x @ kernel + bias[None, None]
    error = jnp.linalg.norm(layer(x) - exact) / jnp.linalg.norm(exact)
    assert error < {"int8": 0.02, "fp8": 0.05}[kind]


@pytest.mark.parametrize("kind", KINDS)
def test_rounded_parameters_fit_the_network_and_its_leaves(kind):
    config = NANO.replace(weights=kind)
    params = make_network().params
    rounded = flatten(quantise_params(params, kind))
    expected = flatten(Network.abstract(DiT, config).params)
    leaves = quantised_leaves(flatten(params), kind)
    for other in (expected, leaves):
        assert {p: (a.shape, a.dtype) for p, a in rounded.items()} == {
            p: (a.shape, a.dtype) for p, a in other.items()
        }
    changed = {path for path in rounded if path.endswith("_scale")}
    assert len(changed) == 4 + 4 + 2 + 4


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_stream_of_rounded_weights_stays_near(kind):
    audio = make_audio(2)

    def stream(network):
        made = SequentialStream(network, StreamPlan(), make_conditions())
        return np.asarray([made.push(chunk)[0] for chunk in audio])

    network = make_network()
    exact = stream(network)
    config = NANO.replace(weights=kind)
    rounded = stream(
        Network.abstract(DiT, config).with_params(quantise_params(network.params, kind))
    )
    error = np.linalg.norm(rounded - exact) / np.linalg.norm(exact)
    assert 0 < error < 0.05

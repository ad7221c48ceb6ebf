"""An adapter beside the kernels is the adapter added to them, in every form of the network."""

import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_avatar import testing
from jax_avatar.models.cache import block_position, empty_cache
from jax_avatar.models.dit import DiT
from jax_avatar.models.lora import add_adapter, init_adapter, with_adapter
from jax_avatar.models.network import Network, flatten
from jax_avatar.models.quantise import quantise_params
from jax_avatar.models.sharding import param_specs

SCALING, RANK = 0.5, 2
PLAIN = testing.NANO.replace(framepack=False)  # two layers, so that stacks are stacks
ADAPTED = PLAIN.replace(adapter_rank=RANK, adapter_scaling=SCALING)
slow = pytest.mark.slow
FORMS = [
    "bidirectional",
    "block_after",
    pytest.param("block_causal", marks=slow),
    pytest.param("stream_block", marks=slow),
]


def adapter(fresh=False):
    made = init_adapter(plain_params(), RANK, jax.random.key(3))
    return made if fresh else jax.tree.map(lambda leaf: leaf + 0.1, made)


def plain_params():
    return testing.make_network(PLAIN).params


@functools.cache
def structure(config):
    return Network.abstract(DiT, config)


@functools.cache
def given():
    told, noisy = testing.make_conditions(PLAIN), testing.make_latents(6, PLAIN)
    return told, noisy, np.concatenate([*testing.make_audio(2, PLAIN)], axis=2)


@functools.cache
def compiled(form, config):
    given()  # made now, so that they are numbers
    return jax.jit(functools.partial(network, form, config))


def velocity(form, config, params):
    return compiled(form, config)(params)


def network(form, config, params):
    """What it says of a block, or of a clip of two."""
    b, block = 1, config.frames_per_block
    told, noisy, audio = given()
    dit = structure(config).bind(params)
    frames = 2 * block if form in ("bidirectional", "block_causal") else block
    noisy, audio = noisy[:, :frames], jnp.asarray(audio[:, :, : 4 * frames])
    timestep = jnp.full((b, frames), 700.0)
    if frames > block:
        pose = jnp.concatenate([told.pose] * 2, axis=1)
        return getattr(dit, form)(noisy, timestep, replace(told, pose=pose, audio=audio))
    sink, position = dit.prefill(told), block_position(config, 0, 16)
    told = told.with_audio(audio)
    if form == "stream_block":
        cache = empty_cache(config, b, *testing.GRID)
        return dit.stream_block(noisy, timestep, told, cache, sink, position)[0]
    past = jnp.zeros((b, 0, config.num_heads, config.head_dim), config.dtype)
    return dit.block_after(noisy, timestep, told, lambda layer: (past, past), sink, position)[0]


@pytest.mark.parametrize("form", FORMS)
def test_beside_the_kernels_or_added_to_them_is_the_same(form):
    base = plain_params()
    plain = velocity(form, PLAIN, base)
    merged = velocity(form, PLAIN, add_adapter(base, adapter(), SCALING))
    beside = velocity(form, ADAPTED, with_adapter(base, adapter()))
    np.testing.assert_allclose(beside, merged, atol=1e-5)
    assert np.abs(merged - plain).max() > 1e-2
    fresh = velocity(form, ADAPTED, with_adapter(base, adapter(fresh=True)))
    np.testing.assert_array_equal(fresh, plain)


def test_a_base_in_half_precision_keeps_its_type_and_the_factors_theirs():
    half = PLAIN.replace(dtype="bfloat16", param_dtype="bfloat16")
    base = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), plain_params())
    both = with_adapter(base, adapter())
    kinds = {path.rpartition("/")[2]: leaf.dtype for path, leaf in flatten(both).items()}
    assert (kinds["a"], kinds["b"], kinds["kernel"]) == (jnp.float32, jnp.float32, jnp.bfloat16)
    config = half.replace(adapter_rank=RANK, adapter_scaling=SCALING)
    beside = velocity("block_causal", config, both)
    exact = velocity("block_causal", ADAPTED, with_adapter(plain_params(), adapter()))
    np.testing.assert_allclose(beside, exact, atol=0.05 * np.abs(exact).max())


@pytest.mark.parametrize("kind", ["int8", pytest.param("fp8", marks=slow)])
def test_a_rounded_base_takes_an_adapter(kind):
    params = quantise_params(plain_params(), kind)
    rounded, both = PLAIN.replace(weights=kind), ADAPTED.replace(weights=kind)
    plain = velocity("block_causal", rounded, params)
    fresh = velocity("block_causal", both, with_adapter(params, adapter(fresh=True)))
    np.testing.assert_array_equal(fresh, plain)
    beside = velocity("block_causal", both, with_adapter(params, adapter()))
    exact = velocity("block_causal", ADAPTED, with_adapter(plain_params(), adapter()))
    assert np.abs(beside - exact).max() < 0.5 * np.abs(exact - plain).max()


@slow
@pytest.mark.parametrize("form", ["bidirectional", "block_causal", "block_after"])
def test_recomputed_layers_have_the_same_gradient(form):
    base = plain_params()

    def slope(config):
        given()

        def loss(factors):
            return jnp.sum(jnp.square(network(form, config, with_adapter(base, factors))))

        return jax.jit(jax.grad(loss))

    again = slope(ADAPTED.replace(rematerialise=True))
    for a, b in zip(*(jax.tree.leaves(f(adapter())) for f in (slope(ADAPTED), again)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4 * np.abs(b).max())
    assert "remat" in str(again.trace(adapter()).jaxpr)


def test_factors_are_cut_as_their_kernels_and_never_along_the_rank():
    axes = {"data": 2, "model": 2}
    for tree in (adapter(), with_adapter(plain_params(), adapter())):
        specs = flatten(param_specs(tree, axes, smallest=1))
        found = {}
        for path, spec in specs.items():
            for place in ("/kernel/", "/adapter/"):
                layer, _, factor = path.partition(place)
                if factor:
                    found[layer.rpartition("/")[2], factor] = tuple(spec)
        assert found["query", "a"] == (None, "data", None)
        assert found["query", "b"] == (None, None, ("model", "data"))
        assert found["ffn_out", "a"] == (None, ("model", "data"), None)
        assert found["ffn_out", "b"] == (None, None, "data")

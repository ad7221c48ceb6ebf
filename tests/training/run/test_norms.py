"""Norms by family of modules, of whole networks and of adapters."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jax_avatar import testing
from jax_avatar.models.dit import DiT
from jax_avatar.models.lora import init_adapter
from jax_avatar.models.network import Network
from jax_avatar.training.run.norms import average_distance, family_norms
from jax_avatar.training.run.state import start_state
from jax_avatar.training.run.step import LoopConfig, make_optimiser
from tests.training.run.test_loop import LineTask

FAMILIES = {
    *("attention", "cross_attention", "ffn", "audio", "modulation", "embedding", "head"),
}


def test_every_parameter_of_a_transformer_belongs_to_one_family():
    shapes = Network.abstract(DiT, testing.NANO.replace(framepack=True)).params
    params = jax.tree.map(lambda leaf: np.ones(leaf.shape, np.float32), shapes)
    measure = functools.partial(family_norms, "weight")
    norms = jax.jit(measure)(params)
    assert norms.keys() == {f"weight/{name}" for name in FAMILIES}
    whole = np.sqrt(sum(float(norm) ** 2 for norm in norms.values()))
    np.testing.assert_allclose(
        whole, np.sqrt(sum(leaf.size for leaf in jax.tree.leaves(params))), rtol=1e-6
    )
    own = sum(leaf.size for leaf in jax.tree.leaves(params["blocks"]["self_attention"]))
    np.testing.assert_allclose(norms["weight/attention"] ** 2, own, rtol=1e-6)
    adapters = jax.eval_shape(lambda: init_adapter(shapes, 2, jax.random.key(0)))
    names = jax.eval_shape(measure, adapters).keys()
    assert {"weight/attention", "weight/ffn"} <= names <= norms.keys()


@pytest.mark.parametrize("bad_step", [None, 1])
def test_a_step_tells_the_norms_of_what_it_did(bad_step):
    config = LoopConfig(num_steps=9, warmup_steps=0, learning_rate=0.1, ema_decay=0.5)
    task = LineTask(bad_step=bad_step)
    step = task.make_step(config)
    state = start_state(task.init(jax.random.key(0)), make_optimiser(config))
    for number in range(2):
        before = jax.tree.map(np.array, state.params)
        state, metrics = step(state, task.batches(number), jax.random.key(1))
    for name in ("weight", "bias"):  # no transformer's names: families of their own
        change = np.asarray(state.params[name]) - before[name]
        np.testing.assert_allclose(
            metrics[f"update/{name}"], np.linalg.norm(change), rtol=1e-4, atol=1e-7
        )
        np.testing.assert_allclose(
            metrics[f"weight/{name}"], np.linalg.norm(state.params[name]), rtol=1e-6
        )
    assert (float(metrics["update/weight"]) > 0) == (bad_step is None)
    if bad_step is None:
        parts = [float(metrics[f"grad/{name}"]) for name in ("weight", "bias")]
        np.testing.assert_allclose(np.hypot(*parts), metrics["grad_norm"], rtol=1e-6)
    far = jax.tree.map(lambda e, p: np.asarray(e - p), state.ema, state.params)
    far = optax.global_norm(far) / optax.global_norm(state.params)
    np.testing.assert_allclose(metrics["ema_distance"], far, rtol=1e-5)
    assert float(far) > 0


def test_equal_averages_have_no_distance_and_zero_weights_divide_nothing():
    tree = {"a": jnp.zeros(3), "b": jnp.zeros((2, 2))}
    assert float(average_distance(tree, tree)) == 0

"""Adapters through the stages: trained beside a frozen base, handed on, streamed."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_avatar import testing
from jax_avatar.data.latents import random_clips
from jax_avatar.layout import make_training_mesh
from jax_avatar.models.lora import add_adapter
from jax_avatar.models.network import flatten
from jax_avatar.training.distill_state import DistillConfig
from jax_avatar.training.rollout_plan import RolloutConfig
from jax_avatar.training.run.loop import train
from jax_avatar.training.run.placement import place_batch, place_state
from jax_avatar.training.run.state import start_state
from jax_avatar.training.run.step import LoopConfig, make_optimiser
from jax_avatar.training.stages.distill import DistillTask, DistillWeights
from jax_avatar.training.stages.flow import ForcingConfig, ForcingFiles, ForcingTask
from jax_avatar.weights.files import load_weights
from jax_avatar.weights.folder import export_model, load_model
from jax_avatar.weights.networks import read_dit

MODEL = testing.NANO.replace(framepack=False, num_layers=2, ring_blocks=2)
SETTINGS = ForcingConfig(
    batch_size=4, latents=6, reference_frames=(13, 30), adapter_rank=2, adapter_alpha=4.0
)
LOOP = LoopConfig(num_steps=2, learning_rate=1e-2, warmup_steps=0, log_every=1, checkpoint_every=1)
KEY = jax.random.key(11)


@functools.cache
def clips():
    return random_clips(3, 7, (4, 4), 4, (2, 6))


def make_task(model, settings=SETTINGS):
    """Stage 1 from the weights in a model folder."""
    start = functools.partial(read_dit, str(model), testing.make_network(MODEL).params)

    def export(folder, params, metadata, *, adapter):
        export_model(folder, str(model), params, MODEL, metadata, stream={}, adapter=adapter)

    return ForcingTask(MODEL, settings, clips(), files=ForcingFiles(start, export=export))


def assert_same(left, right):
    for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_fresh_adapter_has_the_loss_of_the_weights_alone(tmp_path):
    adapted = make_task(testing.save_model(tmp_path))
    whole = make_task(tmp_path, dataclasses.replace(SETTINGS, adapter_rank=0))
    batch = adapted.batches(0)
    base = jax.tree.map(jnp.asarray, whole.init(KEY))
    expected, _ = jax.jit(whole.loss)(base, batch, KEY)
    adapter = adapted.init(KEY)
    found, slope = jax.jit(jax.value_and_grad(lambda *a: adapted.loss(*a)[0]))(
        adapter, batch, KEY, adapted.frozen()
    )
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    assert_same(adapted.frozen(), base)
    assert all(path.endswith(("/a", "/b")) for path in flatten(slope))
    assert max(float(np.abs(leaf).max()) for leaf in jax.tree.leaves(slope)) > 0


@pytest.fixture(scope="module")
def stage1(tmp_path_factory):
    """A run of stage 1 with adapters, and its state."""
    folder = tmp_path_factory.mktemp("stage1")
    testing.save_model(folder / "model")
    state = train(make_task(folder / "model"), LOOP, folder / "run", progress=False)
    return folder, state


def test_only_the_adapter_is_trained_and_kept_beside_the_base(stage1):
    folder, state = stage1
    assert_same(load_weights(folder / "run", "dit")[0], load_weights(folder / "model", "dit")[0])
    adapter = load_weights(folder / "run", "lora")[0]
    assert_same(adapter, state.ema)
    learnt = flatten(adapter["blocks"])
    assert all(np.abs(leaf).max() > 0 for path, leaf in learnt.items() if "cross" not in path)
    streamed = flatten(load_model(folder / "run").dit.params)
    merged = add_adapter(load_weights(folder / "model", "dit")[0], state.ema, 2.0)
    for path, leaf in flatten(merged).items():
        np.testing.assert_allclose(streamed[path], leaf, atol=1e-6)


def distil(folder, **changes):
    settings = DistillConfig(batch_size=2, latents=6, adapter_rank=2, adapter_alpha=4.0)
    weights = DistillWeights(str(folder / "model"), str(folder / "model"), str(folder / "run"))
    rollout = RolloutConfig(sigmas=(1.0, 0.8, 0.0), shift_max=20)
    settings = dataclasses.replace(settings, **changes)
    return DistillTask(MODEL, rollout, settings, weights, clips())


def test_stage_2_goes_on_with_the_adapter(stage1):
    folder, state = stage1
    started = distil(folder).start(LOOP, KEY)
    assert_same(started.generator, state.ema)
    fresh = [leaf for path, leaf in flatten(started.critic).items() if path.endswith("/b")]
    assert all((leaf == 0).all() for leaf in fresh)


def test_an_adapter_of_another_size_is_named(stage1):
    folder, _ = stage1
    with pytest.raises(ValueError, match=r"is scaled by 2\.0, here by 4\.0 .*adapter_alpha"):
        distil(folder, adapter_alpha=8.0).start(LOOP, KEY)
    with pytest.raises(ValueError, match=r"\(2, 24, 2\) .*expected \(2, 24, 3\).*; .*adapter_rank"):
        distil(folder, adapter_rank=3).start(LOOP, KEY)


def test_an_adapter_beside_another_base_is_refused(stage1, tmp_path):
    folder, _ = stage1
    task = distil(folder)
    params, config, _ = load_weights(folder / "model", "dit")
    testing.save_orbax(tmp_path / "dit", params, config)  # the same weights in another kind of file
    task.weights = dataclasses.replace(task.weights, teacher=str(tmp_path))
    task.start(LOOP, KEY)
    params["blocks"]["ffn_in"]["kernel"] *= 1.01
    testing.save_orbax(tmp_path / "dit", params, config)
    with pytest.raises(ValueError, match=r"run was trained beside other weights than those of"):
        task.start(LOOP, KEY)


@pytest.mark.slow
def test_a_step_is_the_same_on_every_layout(tmp_path):
    testing.save_model(tmp_path)

    def step(layout):
        task = make_task(tmp_path)
        mesh = make_training_mesh(layout, 4, num_heads=2)
        state = place_state(start_state(task.init(KEY), make_optimiser(LOOP)), mesh)
        batch = place_batch(task.batches(0), mesh)
        return task.make_step(LOOP, mesh)(state, batch, KEY)

    expected, wanted = step("1")
    for layout in ("4x2", "2x1"):
        state, metrics = step(layout)
        np.testing.assert_allclose(metrics["grad_norm"], wanted["grad_norm"], rtol=1e-5)
        pairs = zip(jax.tree.leaves(state), jax.tree.leaves(expected), strict=True)
        for a, b in pairs:
            # A weight's first update is its gradient's sign, which rounding may turn at zero.
            np.testing.assert_allclose(a, b, atol=1e-5)


@pytest.mark.parametrize("layout", [None, "4x2"])
def test_weights_are_read_where_they_belong_without_the_motion_packer(tmp_path, layout):
    whole = testing.NANO.replace(num_layers=1)
    params = testing.make_network(whole).params
    testing.save_orbax(tmp_path / "dit", params, {})
    expected = testing.make_network(whole.replace(framepack=False)).params
    mesh = make_training_mesh(layout, None, num_heads=2) if layout else None
    found = read_dit(tmp_path, expected, mesh)
    assert set(found) == set(expected) < set(params)
    assert_same(found, {name: params[name] for name in found})
    if layout:
        kernel = found["blocks"]["ffn_in"]["kernel"]
        assert kernel.sharding.shard_shape(kernel.shape) != kernel.shape

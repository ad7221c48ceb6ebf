"""No layout of devices, and no accumulation, changes what is learnt."""

import contextlib
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_avatar import testing
from jax_avatar.data.latents import random_clips
from jax_avatar.layout import TrainingLayout, make_training_mesh, parse_training_layout
from jax_avatar.models import sharding
from jax_avatar.models.conditions import Conditions
from jax_avatar.models.lora import init_adapter
from jax_avatar.models.sharding import on_mesh
from jax_avatar.training import distillation
from jax_avatar.training.distill_state import ClipBatch, DistillConfig
from jax_avatar.training.distillation import Distillation, rollout_inputs
from jax_avatar.training.rollout_plan import RolloutConfig, RolloutPlan
from jax_avatar.training.run.accumulate import accumulate_gradients
from jax_avatar.training.run.loader import DataError
from jax_avatar.training.run.loop import train
from jax_avatar.training.run.placement import local_rows, place_batch, place_state
from jax_avatar.training.run.state import start_state
from jax_avatar.training.run.step import LoopConfig, make_optimiser
from jax_avatar.training.scores import sample_noise
from jax_avatar.training.stages.flow import ForcingConfig, ForcingTask

BATCH, GRID = 8, (2, 4)
MODEL = testing.NANO.replace(framepack=False, num_layers=1, ring_blocks=2)
# Many steps, so that parts which drew exits of their own would hardly draw the same.
ROLLOUT = RolloutConfig(sigmas=(1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.0), shift_max=20)
SETTINGS = DistillConfig(batch_size=BATCH, latents=6, adapter_rank=2, adapter_alpha=4.0)
# With a first moment, the state after a step shows the gradient as it is.
LOOP = LoopConfig(num_steps=9, warmup_steps=0, betas=(0.5, 0.999), max_grad_norm=1e6)
KEY = jax.random.key(11)

LAYOUTS = [("2x2x2", 2)]
MORE = [
    ("2x2x1", 2),
    ("2x1x1", 4),
    ("2x2", 4),
    ("1", 4),
    ("2", 1),
    ("4", 1),
    ("8", 1),
    ("1x2", 1),
    ("4x2", 1),
]
EVERY = [*LAYOUTS, *(pytest.param(*pair, marks=pytest.mark.slow) for pair in MORE)]


@pytest.fixture(autouse=True, scope="module")
def every_weight_is_cut():
    """However small it is."""
    small = sharding.SMALL
    sharding.SMALL = 1
    yield
    sharding.SMALL = small


def norm(tree):
    leaves = [np.asarray(leaf, np.float64) for leaf in jax.tree.leaves(tree)]
    return np.sqrt(sum(np.square(leaf).sum() for leaf in leaves))


def difference(left, right):
    left, right = jax.device_get((left, right))
    return norm(jax.tree.map(lambda a, b: a - b, left, right)) / norm(right)


def first_moment(optimiser_state):
    (moment,) = [
        part.mu for part in jax.tree.leaves(optimiser_state, is_leaf=has_mu) if has_mu(part)
    ]
    return moment


def has_mu(part):
    return hasattr(part, "mu")


def mesh_of(text, accumulate):
    return make_training_mesh(text, BATCH, accumulate=accumulate, num_heads=MODEL.num_heads)


# ---- distillation ------------------------------------------------------------------------


@functools.cache
def network():
    return testing.make_network(MODEL)


def make_batch():
    keys = jax.random.split(jax.random.key(0), 3)
    reference = jax.random.normal(keys[0], (BATCH, 1, *GRID, 4))
    features = (BATCH, 1, 24, MODEL.audio_layers, MODEL.audio_width)
    text = jax.random.normal(keys[2], (BATCH, 2, MODEL.text_width))
    features = jax.random.normal(keys[1], features)
    row = np.arange(BATCH, dtype=np.int32)
    conditions = Conditions(
        text=text, null_text=jnp.zeros_like(text), reference=reference, audio=features,
        pose=reference,
    )  # fmt: skip
    return ClipBatch(conditions, row)


def distil(role, layout=None, accumulate=1):
    """State and metrics after one update."""
    base = network().params
    setup = distillation_of(dataclasses.replace(LOOP, accumulate=accumulate))
    # Not fresh ones, whose second factors are zero, so that first factors have no gradient.
    adapters = [
        jax.tree.map(lambda leaf: leaf + 0.02, init_adapter(base, 2, key))
        for key in jax.random.split(KEY)
    ]
    state, batch = distillation.start(setup, *adapters), make_batch()
    mesh = mesh_of(layout, accumulate) if layout else None
    if mesh:
        state, base, batch = (
            place_state(state, mesh),
            place_state(base, mesh),
            place_batch(batch, mesh),
        )
    update = functools.partial(getattr(distillation, f"update_{role}"), setup)
    return jax.jit(on_mesh(update, mesh))(state, batch, KEY, base)


@functools.cache
def alone(role):
    return distil(role)


@pytest.mark.slow
@pytest.mark.parametrize(("layout", "accumulate"), LAYOUTS + MORE)
@pytest.mark.parametrize("role", ["generator", "critic"])
def test_distillation_is_the_same_on_every_layout(role, layout, accumulate):
    expected, wanted = alone(role)
    state, metrics = distil(role, layout, accumulate)
    moments = [first_moment(getattr(s, f"{role}_optimiser")) for s in (state, expected)]
    assert difference(*moments) < 1e-5
    assert norm(moments[1]) > 0
    loss = {"generator": "dmd_loss", "critic": "loss"}[role]
    for name in (loss, f"{role}_norm"):
        np.testing.assert_allclose(metrics[name], wanted[name], rtol=1e-5)
    if role == "generator":
        assert int(metrics["generator_exit"]) == int(wanted["generator_exit"])


def test_clips_have_their_own_chance_and_one_exit():
    """Were noise or positions shared, equal clips would be made from equal conditions."""
    setup, batch = distillation_of(LOOP), make_batch()
    same = jax.tree.map(lambda leaf: jnp.broadcast_to(leaf[:1], leaf.shape), batch)
    same = dataclasses.replace(same, row=batch.row)
    _, draws = rollout_inputs(setup, same, KEY)
    assert len(np.unique(draws.first_frame)) > 1
    assert np.abs(draws.noise[0] - draws.noise[1]).max() > 0.1
    swapped = dataclasses.replace(same, row=batch.row[::-1])
    swapped_draws = rollout_inputs(setup, swapped, KEY)[1]
    np.testing.assert_array_equal(swapped_draws.noise[0], draws.noise[-1])
    clips = jnp.zeros((BATCH, 6, *GRID, 4))
    (noise, sigma), (other, level) = (
        sample_noise(KEY, clips, row, SETTINGS) for row in (batch.row, swapped.row)
    )
    assert len(np.unique(sigma)) > 1 and np.abs(noise[0] - noise[1]).max() > 0.1
    np.testing.assert_array_equal(other[::-1], noise)
    np.testing.assert_array_equal(level[::-1], sigma)


def distillation_of(loop):
    config = SETTINGS.adapted(MODEL)
    student = testing.make_network(config).bind
    teacher = network().bind
    return Distillation(student, teacher, RolloutPlan(config, ROLLOUT), SETTINGS, loop)


# ---- tasks with a loss -------------------------------------------------------------------


@functools.cache
def forcing(layout=None, accumulate=1):
    clips = random_clips(3, 7, GRID, 4, (2, 6))
    settings = ForcingConfig(batch_size=BATCH, latents=6, reference_frames=(13, 30))
    task = ForcingTask(MODEL, settings, clips)
    loop = dataclasses.replace(LOOP, accumulate=accumulate)
    state = start_state(network().params, make_optimiser(loop))
    batch, mesh = task.batches(0), mesh_of(layout, accumulate) if layout else None
    if mesh:
        state, batch = place_state(state, mesh), place_batch(batch, mesh)
    return task.make_step(loop, mesh)(state, batch, KEY)


@pytest.mark.parametrize(("layout", "accumulate"), EVERY)
def test_diffusion_forcing_is_the_same_on_every_layout(layout, accumulate):
    expected, wanted = forcing()
    state, metrics = forcing(layout, accumulate)
    moments = [first_moment(s.optimiser) for s in (state, expected)]
    assert difference(*moments) < 1e-5
    for name in ("loss", "grad_norm"):
        np.testing.assert_allclose(metrics[name], wanted[name], rtol=1e-5)


def test_the_state_stays_where_it_was_put():
    state, _ = forcing("2x2x2", 2)
    kernel = state.params["blocks"]["ffn_in"]["kernel"]
    assert tuple(kernel.sharding.spec) == (None, "data", "model")
    moment = first_moment(state.optimiser)["blocks"]["ffn_in"]["kernel"]
    assert moment.sharding.is_equivalent_to(kernel.sharding, kernel.ndim)
    # Eight devices hold quarters: both replicas have all of it.
    assert len({str(shard.index) for shard in kernel.addressable_shards}) == 4
    axes = {axis for leaf in jax.tree.leaves(state) for axis in str(leaf.sharding.spec).split("'")}
    assert "replica" not in axes and {"data", "model"} <= axes


@pytest.mark.slow
def test_a_run_goes_on_on_another_mesh(tmp_path):
    clips = random_clips(3, 7, GRID, 4, (2, 6))
    settings = ForcingConfig(batch_size=BATCH, latents=6, reference_frames=(13, 30))
    runs = {}
    for name, meshes in (("moved", ("4x2", "1")), ("stayed", ("1", "1"))):
        for stop, mesh in zip((1, 2), meshes, strict=True):
            task = ForcingTask(MODEL, settings, clips)
            # A run of two steps that is interrupted after the first.
            task.windows.batch = interrupting(task.windows.batch, stop)
            loop = dataclasses.replace(LOOP, num_steps=2, mesh=mesh, checkpoint_every=1)
            with contextlib.suppress(DataError):
                runs[name] = train(task, loop, tmp_path / name, progress=False)
    moved, stayed = (runs[name].params for name in ("moved", "stayed"))
    assert {len(leaf.devices()) for leaf in jax.tree.leaves(moved)} == {1}
    assert difference(moved, stayed) < 1e-5


class Interruption(Exception):
    """Stands for a kill."""


def interrupting(batches, stop):
    def until(step, **share):
        if step >= stop:
            raise Interruption
        return batches(step, **share)

    return until


# ---- parts and places --------------------------------------------------------------------


def test_parts_of_a_batch_have_its_mean_and_its_order():
    values = jax.random.normal(KEY, (12, 3))

    def measure(part):
        return {"g": jnp.mean(part**2, 0)}, {"m": part.mean()}, {"top": part.max(-1)}

    whole, parts = (accumulate_gradients(measure, values, count) for count in (1, 4))
    for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(parts), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5)


def test_without_a_mesh_all_devices_share_a_batch_that_divides():
    assert dict(make_training_mesh("", 16).shape) == {"data": 8, "model": 1}
    assert make_training_mesh("", 12).size == make_training_mesh("", None).size == 1
    assert make_training_mesh("", 16, accumulate=4).size == 1
    np.testing.assert_array_equal(local_rows(16, make_training_mesh("4x2", 16)), np.arange(16))


def test_replicas_have_clips_of_their_own():
    """A shard group is a run of neighbouring devices, those of a host."""
    mesh = make_training_mesh("2x4x1", 8)
    assert dict(mesh.shape) == {"replica": 2, "data": 4, "model": 1}
    assert [[d.id for d in group] for group in mesh.devices[..., 0]] == [[0, 1, 2, 3], [4, 5, 6, 7]]
    clips = place_batch(np.arange(8), mesh)
    assert [int(s.data[0]) for s in clips.addressable_shards] == list(range(8))
    np.testing.assert_array_equal(local_rows(8, mesh), np.arange(8))
    weights = place_state({"blocks": {"ffn_in": {"kernel": np.zeros((1, 8, 4))}}}, mesh)
    (kernel,) = jax.tree.leaves(weights)
    assert tuple(kernel.sharding.spec) == (None, "data", None)
    assert dict(make_training_mesh("1x8x1", 8).shape) == {"data": 8, "model": 1}


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        ("4by2", {}, r"'4by2': expected DATAxMODEL devices such as 4x2"),
        ("2x2x1x2", {}, r"'2x2x1x2': expected .* or REPLICAxDATAxMODEL such as 16x8x1"),
        ("2x0x1", {}, r"'2x0x1': expected"),
        ("2x2x4", {}, r"2x2x4 takes 16 devices, of 8 here"),
        ("2x4x1", {"batch_size": 12}, r"=2x4x1 spreads 12 clips over 8 devices"),
        ("3", {}, r"3x1 takes 3 devices, of 8 here; choose DATAxMODEL whose product divides 8"),
        ("4x4", {}, r"4x4 takes 16 devices, of 8 here"),
        ("8", {"batch_size": 12}, r"spreads 12 clips over 8 devices .* a multiple of 8"),
        ("4", {"accumulate": 4}, r"spreads 2 clips over 4 devices \(a batch of 8 in 4 parts\)"),
        ("1", {"accumulate": 3}, r"loop\.accumulate=3 does not divide the batch of 8"),
        ("1x8", {}, r"splits 2 attention heads over 8 devices; choose a divisor of 2"),
    ],
)
def test_what_does_not_divide_is_named(text, options, message):
    with pytest.raises(ValueError, match=message):
        make_training_mesh(text, **{"batch_size": BATCH, "num_heads": 2} | options)


def test_a_mesh_is_replicas_times_data_times_model():
    texts = ("4x2", "8", "16x8x1")
    layouts = [parse_training_layout(text) for text in texts]
    assert layouts == [TrainingLayout(*sizes) for sizes in ((1, 4, 2), (1, 8, 1), (16, 8, 1))]
    assert [str(layout) for layout in layouts] == ["4x2", "8x1", "16x8x1"]
    assert [layout.num_devices for layout in layouts] == [8, 8, 128]

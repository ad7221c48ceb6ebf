"""The error on held-out clips: the same clips, noise and levels in every call and on every mesh."""

import dataclasses
import functools
import logging
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_avatar import testing
from jax_avatar.data.latents import random_clips
from jax_avatar.layout import make_training_mesh
from jax_avatar.training.distill_state import DistillConfig
from jax_avatar.training.rollout_plan import RolloutConfig
from jax_avatar.training.run.placement import place_state
from jax_avatar.training.run.step import LoopConfig
from jax_avatar.training.stages import build as stages
from jax_avatar.training.stages.distill import DistillTask, DistillWeights
from jax_avatar.training.stages.flow import ForcingConfig, ForcingFiles, ForcingTask
from jax_avatar.training.stages.validation import NUM_BINS, FlowValidation, levels_in_bins

MODEL = testing.NANO.replace(framepack=False, num_layers=1, ring_blocks=2)
SETTINGS = ForcingConfig(batch_size=4, latents=6, reference_frames=(13, 30))
LOOP = LoopConfig(num_steps=2, warmup_steps=0, evaluate_every=1, validation_clips=3)


@functools.cache
def clips(seed=0):
    return random_clips(3, 7, (4, 4), 4, (2, 6), seed=seed)


def task_of(**changes):
    settings = dataclasses.replace(SETTINGS, **changes)
    return ForcingTask(MODEL, settings, clips(), files=ForcingFiles(held_out=lambda: clips(1)))


def state_of(params, raw=None):
    return SimpleNamespace(ema=params, params=params if raw is None else raw)


def test_every_bin_has_a_level_and_clips_come_once_whatever_the_mesh():
    levels = levels_in_bins(jax.random.key(3))
    np.testing.assert_array_equal(np.floor(levels * NUM_BINS), np.arange(NUM_BINS))
    assert len(np.unique(levels_in_bins(jax.random.key(4)) - levels)) > 0

    asked = []

    def make_batch(rows):
        asked.append(rows.tolist())
        return {"row": rows.astype(np.float32)}

    def errors(weights, beside, batch):
        return batch["row"][:, None] * weights * beside + jnp.arange(NUM_BINS)[None]

    for mesh in ("1", "2", "4"):
        validation = FlowValidation(
            errors,
            make_batch,
            make_training_mesh(mesh, None),
            count=6,
            at_once=4,
            beside=lambda state: state.other,
        )
        state = SimpleNamespace(ema=jnp.float32(1), params=jnp.float32(3), other=jnp.float32(10))
        scores = validation(state, 5)
        # The mean number of six clips, 0 to 5, is 2.5.
        assert scores["flow_bin0"] == 25 and scores["flow_bin9"] == 34 and scores["flow"] == 29.5
        assert scores["raw/flow_bin0"] == 75 and len(scores) == 2 * (NUM_BINS + 1)
    assert asked[:2] == [[0, 1, 2, 3], [4, 5, 0, 1]]


def test_the_error_is_that_of_the_velocity_at_the_level_of_the_bin():
    task = task_of()
    (validation,) = task.evaluations(LOOP, make_training_mesh("1", None))
    params = jax.tree.map(jnp.asarray, task.init(jax.random.key(0)))
    nothing = params | {"head": jax.tree.map(jnp.zeros_like, params["head"])}
    found = validation(state_of(nothing), 0)
    # A velocity of zero misses noise minus clean, whose variances are 1 each, at every level.
    bins = [found[f"flow_bin{i}"] for i in range(NUM_BINS)]
    np.testing.assert_allclose(bins, bins[0], rtol=1e-5)
    assert bins[0] == pytest.approx(2, abs=0.15)
    some = validation(state_of(testing.make_network(MODEL).params, nothing), 0)
    assert len({some[f"flow_bin{i}"] for i in range(NUM_BINS)}) == NUM_BINS
    assert {key: some[f"raw/{key}"] for key in found if "raw" not in key} == {
        key: value for key, value in found.items() if "raw" not in key
    }


def test_the_network_is_told_the_level_of_the_bin():
    task = task_of()

    def velocity(params, noisy, sigma, told, key):
        return 0 * noisy + 10 * sigma[:, :, None, None, None]

    task.velocity = velocity
    (validation,) = task.evaluations(LOOP, make_training_mesh("1", None))
    found = validation(state_of({}), 0)
    bins = np.array([found[f"flow_bin{i}"] for i in range(1, NUM_BINS)])
    # Ten times the level misses a target of variance 2 and mean 0; levels differ between clips.
    levels = np.sqrt(bins - 2) / 10
    np.testing.assert_allclose(levels, (np.arange(1, NUM_BINS) + 0.5) / NUM_BINS, atol=0.07)


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 2])
def test_the_error_is_the_same_on_every_mesh(rank):
    def found(layout):
        task = task_of(adapter_rank=rank)
        mesh = make_training_mesh(layout, 4, num_heads=2)
        (validation,) = task.evaluations(LOOP, mesh)
        weights = jax.tree.map(lambda leaf: leaf + 0.01, task.init(jax.random.key(0)))
        return validation(state_of(place_state(weights, mesh)), 0)

    expected = found("1")
    for layout in ("2x2", "4"):
        other = found(layout)
        np.testing.assert_allclose(list(other.values()), list(expected.values()), rtol=2e-5)


def test_clips_that_are_not_there_or_not_asked_for_are_left_out(monkeypatch, caplog):
    mesh = make_training_mesh("1", None)
    assert task_of().evaluations(dataclasses.replace(LOOP, validation_clips=0), mesh) == []
    assert ForcingTask(MODEL, SETTINGS, clips()).evaluations(LOOP, mesh) == []
    monkeypatch.setattr(stages, "read_index", lambda folder: {"splits": {"train": []}})
    with caplog.at_level(logging.WARNING):
        assert stages.held_out_clips({"latents": "data/some"}) is None
    assert "data/some has no clips of split held_out_person" in caplog.text
    with pytest.raises(ValueError, match=r"loop\.validation_clips -1 must be 0 or more"):
        dataclasses.replace(LOOP, validation_clips=-1)


@pytest.mark.slow
def test_of_a_critic_it_is_the_error_on_clips_of_the_student(tmp_path):
    testing.save_model(tmp_path)
    settings = DistillConfig(batch_size=2, latents=6)
    rollout = RolloutConfig(sigmas=(1.0, 0.8, 0.0), shift_max=20)
    weights, model = DistillWeights(str(tmp_path)), MODEL
    task = DistillTask(model, rollout, settings, weights, clips(), held_out=lambda: clips(1))
    (validation,) = task.evaluations(LOOP, make_training_mesh("1", None))
    state = task.start(LOOP, jax.random.key(0))
    found = validation(state, 0)
    assert found["critic_flow"] == found["raw/critic_flow"] > 0

    def changed(tree):
        return tree | {"head": jax.tree.map(lambda leaf: 2 * leaf, tree["head"])}

    # Another student, other clips; another critic, other errors; whose average is nobody's.
    student = dataclasses.replace(state, generator=changed(state.generator))
    assert validation(student, 0)["raw/critic_flow"] != found["raw/critic_flow"]
    assert validation(student, 0)["critic_flow"] == found["critic_flow"]
    critic = dataclasses.replace(state, critic=changed(state.critic))
    assert validation(critic, 0)["critic_flow"] != found["critic_flow"]

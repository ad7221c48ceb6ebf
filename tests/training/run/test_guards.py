import dataclasses
import json
import os
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_avatar.training.run.clock import is_timing
from jax_avatar.training.run.evaluation import AverageEvaluation
from jax_avatar.training.run.guards import (
    CAUSES,
    TooManySkips,
    after_rollback,
    check_skips,
    check_update,
    find_strayed_replay,
    guard_metrics,
    is_passed,
    new_guard,
    rate_factor,
    record_skip,
)
from jax_avatar.training.run.loop import train
from jax_avatar.training.run.state import start_state, update_state
from jax_avatar.training.run.step import LoopConfig, make_optimiser
from jax_avatar.training.stages import task as training_task
from jax_avatar.training.stages.task import LossTask

CONFIG = LoopConfig(
    num_steps=90, warmup_steps=2, log_every=7, checkpoint_every=20, keep=2, keep_every=40
)


class StumblingTask(LossTask):
    """Fits a line; between two steps, chance makes half of the losses numbers that are none."""

    name = "stumbling"

    def __init__(self, bad=(30, 70), share=0.5, stop_after=None):
        self.bad, self.share, self.stop_after, self.asked = bad, share, stop_after, []

    def init(self, key):
        return {"weight": jax.random.normal(key, (3, 1))}

    def loss(self, params, batch, key):
        error = batch["x"] @ params["weight"] - batch["x"].sum(-1, keepdims=True)
        is_bad = batch["is_shaky"] & (jax.random.uniform(key) < self.share)
        return jnp.where(is_bad, jnp.nan, jnp.mean(error**2)), {}

    def batches(self, step):
        self.asked.append(step)
        if len(self.asked) == self.stop_after:
            os.kill(os.getpid(), signal.SIGINT)
        x = np.random.default_rng([7, step]).standard_normal((8, 3)).astype(np.float32)
        return {"x": x, "is_shaky": np.array(self.bad[0] <= step < self.bad[1])}


def assert_same(left, right):
    for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        np.testing.assert_array_equal(a, b)


def lines(folder):
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if not is_timing(k)} for line in found]


@pytest.mark.parametrize(
    ("loss", "gradient", "made", "cause"),
    [
        (1.0, 1.0, 3.0, None),
        (1.0, 1.0, 20.5, "clean"),
        (1.0, 1.0, np.nan, "clean"),
        (np.nan, np.nan, np.nan, "clean"),
        (np.inf, 1.0, 3.0, "loss"),
        (np.nan, np.nan, 3.0, "loss"),
        (1.0, np.nan, 3.0, "gradient"),
        (1.0, -1.1e4, 3.0, "gradient"),
    ],
)
def test_the_first_thing_that_went_wrong_is_the_cause(loss, gradient, made, cause):
    grads = {"a": jnp.zeros(3), "b": jnp.float32(gradient)}
    clips = jnp.zeros((1, 2, 2, 2, 2)).at[0, 1, 0, 0, 1].set(made)
    found, norm = check_update(jnp.float32(loss), grads, clips)
    assert int(found) == (1 + CAUSES.index(cause) if cause else 0)
    np.testing.assert_equal(float(norm), float(np.abs(np.float32(gradient))))


def test_skips_are_counted_by_cause_and_forgotten_after_100_steps():
    guard = new_guard()
    for step in (0, 3, 3, 5):
        guard = record_skip(guard, step, jnp.int32(2))
    guard = record_skip(record_skip(guard, 6, jnp.int32(0)), 7, jnp.int32(3))
    assert guard.skipped.tolist() == [0, 4, 1] and int(guard.total) == 5
    recent = [
        int(guard_metrics(guard, step)["recent_skips"]) for step in (7, 99, 100, 103, 106, 107)
    ]
    assert recent == [5, 5, 4, 2, 1, 0]


def test_more_than_20_skips_in_100_steps_are_too_many():
    guard = new_guard()
    for step in range(0, 100, 5):
        guard = record_skip(guard, step, jnp.int32(1))
    rows = [guard_metrics(guard, 99), guard_metrics(record_skip(guard, 99, jnp.int32(1)), 99)]
    check_skips(rows[:1], 100)
    with pytest.raises(TooManySkips, match=r"by step 100 .*\(so far clean 21, loss 0, gradient 0"):
        check_skips(rows, 100)
    spread = guard_metrics(record_skip(guard, 100, jnp.int32(1)), 100)
    check_skips([spread], 101)


def test_a_rollback_halves_what_an_update_does():
    optimiser = make_optimiser(dataclasses.replace(CONFIG, warmup_steps=0))
    state = start_state({"weight": jnp.ones((3, 2))}, optimiser)
    slower = dataclasses.replace(state, guard=after_rollback(state.guard, 2))
    grads = {"weight": jnp.arange(6.0).reshape(3, 2)}
    moves = [
        update_state(s, grads, jnp.int32(0), optimiser, 0.9)[0].params["weight"] - 1
        for s in (state, slower)
    ]
    assert float(rate_factor(slower.guard)) == 0.25
    np.testing.assert_allclose(moves[1], 0.25 * moves[0], atol=1e-7)
    assert np.abs(moves[0]).min() > 1e-5  # weight decay moves where the gradient is zero


def test_an_evaluation_is_passed_with_finite_scores():
    assert is_passed({"lip_r": 0.3}) and is_passed({})
    assert not is_passed({"lip_r": 0.3, "motion": float("nan")})


def test_a_run_that_stumbles_goes_back_and_resumes_alike(tmp_path):
    task = StumblingTask()
    whole = train(task, CONFIG, tmp_path / "whole", progress=False)
    assert int(whole.guard.rollbacks) == 2
    # It went back to a checkpoint made before the trouble, and then forward again.
    assert task.asked.count(19) == 1 and task.asked.count(25) == 3
    assert [line["step"] for line in lines(tmp_path / "whole")] == [*range(7, 91, 7), 90]
    abandoned = tmp_path / "whole" / "metrics_abandoned_1.jsonl"
    assert json.loads(abandoned.read_text().splitlines()[-1])["recent_skips"] > 20

    # Stopped while it stumbles the first time, and after it went back once and twice.
    for rollbacks, stop_after in enumerate((45, 95, 130)):
        cut = tmp_path / str(stop_after)
        stopped = train(StumblingTask(stop_after=stop_after), CONFIG, cut, progress=False)
        assert int(stopped.step) < 90 and int(stopped.guard.rollbacks) == rollbacks
        assert_same(train(StumblingTask(), CONFIG, cut, progress=False), whole)
        assert lines(cut) == lines(tmp_path / "whole")


def test_fresh_resumed_and_rolled_back_runs_are_the_same_program(tmp_path, monkeypatch):
    """Another placement of the state would compile to other roundings."""
    programs, real = {}, training_task.compiled_step

    def compiled_step(*args):
        step = real(*args)

        def call(state, *rest):
            text = step.lower(state, *rest).as_text()
            programs.setdefault(text, []).append((int(state.step), int(state.guard.rollbacks)))
            return step(state, *rest)

        return call

    monkeypatch.setattr(training_task, "compiled_step", compiled_step)
    task = StumblingTask(bad=(6, 28), share=1.0, stop_after=4)
    config = dataclasses.replace(CONFIG, num_steps=30, checkpoint_every=5)
    train(task, config, tmp_path, progress=False)
    with pytest.raises(ValueError, match="third time"):
        train(task, config, tmp_path, progress=False)
    assert len(programs) == 1
    (steps,) = programs.values()
    assert (3, 0) in steps and steps.count((5, 0)) == steps.count((5, 1)) == 1


def test_the_third_time_stops_the_run(tmp_path):
    task = StumblingTask(bad=(5, 90), share=1.0)
    with pytest.raises(ValueError, match=r"by step 28 .*loss 21.* third time"):
        train(task, CONFIG, tmp_path, progress=False)
    assert task.asked.count(0) == 3


class StrayingTask(StumblingTask):
    """In one step, the second pass makes another clip than the first."""

    replay_limit = 1e-3

    def __init__(self, strays_at):
        super().__init__(bad=(0, 0))
        self.strays_at = strays_at

    def loss(self, params, batch, key):
        loss, metrics = super().loss(params, batch, key)
        return loss, metrics | {"replay_error": jnp.where(batch["strays"], 0.5, 1e-4)}

    def batches(self, step):
        return super().batches(step) | {"strays": np.array(step == self.strays_at)}


@pytest.mark.parametrize(("strays_at", "seen_at"), [(30, 35), (58, 60)])
def test_a_replay_that_strays_stops_the_run_and_keeps_its_state(tmp_path, strays_at, seen_at):
    """At the next line of the log, or checkpoint; the continued run stops at nothing old."""
    with pytest.raises(ValueError, match=rf"by step {seen_at} .* by 0\.5, more than 0\.001 .*XLA_"):
        train(StrayingTask(strays_at), CONFIG, tmp_path, progress=False)
    kept = [int(p.name) for p in (tmp_path / "checkpoints").iterdir() if p.name.isdigit()]
    assert max(kept) == seen_at and lines(tmp_path)[-1]["step"] == seen_at
    task = StrayingTask(None)
    state = train(task, CONFIG, tmp_path, progress=False)
    assert task.asked[0] == seen_at and int(state.step) == CONFIG.num_steps


def test_a_replay_within_its_limit_is_nothing_to_tell():
    rows = [{"replay_error": error} for error in (1e-5, np.nan, 1e-3)] + [{"loss": 1.0}]
    assert find_strayed_replay(rows, 4, 1e-3) == "" and find_strayed_replay([], 4, 0.0) == ""
    assert "by 0.001" in find_strayed_replay(rows, 4, 0.9e-3)


def test_the_latest_the_round_and_the_last_good_checkpoint_stay(tmp_path):
    """Skips from step 21 on: the one of step 20 is the last good one."""
    task = StumblingTask(bad=(21, 140), share=0.1)
    config = dataclasses.replace(CONFIG, num_steps=160)
    assert int(train(task, config, tmp_path, progress=False).guard.rollbacks) == 0
    kept = {int(p.name) for p in (tmp_path / "checkpoints").iterdir() if p.name.isdigit()}
    assert kept == {20, 40, 80, 120, 140, 160}


def test_only_what_passes_its_evaluation_is_good(tmp_path):
    task = StumblingTask(bad=(0, 0))
    evaluation = AverageEvaluation(lambda params, step: {"score": np.nan if step > 20 else 1.0})
    config = dataclasses.replace(CONFIG, evaluate_every=20, keep=1, keep_every=0)
    train(task, config, tmp_path, evaluations=[evaluation], progress=False)
    kept = {int(p.name) for p in (tmp_path / "checkpoints").iterdir() if p.name.isdigit()}
    assert kept == {20, 90}

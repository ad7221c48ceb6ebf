import dataclasses
import errno
import json
import os
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_avatar.training.run import loop
from jax_avatar.training.run.checkpoints import explain_disk_errors, restore
from jax_avatar.training.run.evaluation import AverageEvaluation
from jax_avatar.training.run.loop import train
from jax_avatar.training.run.state import TrainState, build_section, start_state
from jax_avatar.training.run.step import LoopConfig, make_optimiser
from jax_avatar.training.stages.task import LossTask


class LineTask(LossTask):
    """Fits a line; step `bad_step` has a batch that is not a number."""

    name = "line"

    def __init__(self, bad_step=None, stop_after=None):
        self.bad_step, self.stop_after = bad_step, stop_after

    def init(self, key):
        return {"weight": jax.random.normal(key, (3, 1)), "bias": jnp.zeros(1)}

    def loss(self, params, batch, key):
        noise = 0.01 * jax.random.normal(key, batch["y"].shape)
        error = batch["x"] @ params["weight"] + params["bias"][None] - batch["y"] + noise
        return jnp.mean(error**2), {"mean_error": jnp.mean(error)}

    def batches(self, step):
        if step == self.stop_after:
            os.kill(os.getpid(), signal.SIGINT)
        rng = np.random.default_rng([7, step])
        x = rng.standard_normal((8, 3)).astype(np.float32)
        y = x @ np.array([[1.0], [-2.0], [0.5]], np.float32) + 3
        return {"x": x, "y": y * np.float32(np.nan if step == self.bad_step else 1)}


CONFIG = LoopConfig(num_steps=12, warmup_steps=2, log_every=4, checkpoint_every=5, weight_decay=0.0)


def assert_same(left, right):
    for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        np.testing.assert_array_equal(a, b)


def test_the_loss_falls_and_the_log_has_every_interval(tmp_path):
    config = dataclasses.replace(CONFIG, num_steps=150, learning_rate=0.1, log_every=50)
    train(LineTask(), config, tmp_path, progress=False)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [50, 100, 150]
    assert lines[-1]["loss"] < 0.1 * lines[0]["loss"]


def test_an_interrupted_run_continues_bit_by_bit(tmp_path):
    whole = train(LineTask(), CONFIG, tmp_path / "whole", progress=False)
    cut = train(LineTask(stop_after=7), CONFIG, tmp_path / "cut", progress=False)
    assert 0 < int(cut.step) < CONFIG.num_steps
    resumed = train(LineTask(), CONFIG, tmp_path / "cut", progress=False)
    assert_same(resumed, whole)
    assert_same(restore(tmp_path / "cut")[0].ema, whole.ema)


def test_a_step_that_is_not_finite_changes_nothing_and_is_counted():
    config = dataclasses.replace(CONFIG, learning_rate=0.1)
    task = LineTask(bad_step=1)
    step = task.make_step(config)
    state = start_state(task.init(jax.random.key(0)), make_optimiser(config))
    states = []
    for number in range(3):
        state, _ = step(state, task.batches(number), jax.random.key(1))
        states.append(jax.tree.map(np.array, state))
    before, bad, after = states
    for name in ("params", "ema", "optimiser"):
        assert_same(getattr(bad, name), getattr(before, name))
    assert bad.guard.skipped.tolist() == [0, 1, 0] and int(bad.step) == 2
    assert np.isfinite(after.params["weight"]).all()
    assert not np.array_equal(after.params["weight"], bad.params["weight"])


def test_other_settings_are_refused_by_name_unless_forced(tmp_path):
    settings = {"model": {"width": 8, "layers": (1, 2)}, "loop": {"ignored": 1}}
    train(LineTask(stop_after=3), CONFIG, tmp_path, settings=settings, progress=False)
    logged = dataclasses.replace(CONFIG, log_every=3)
    train(LineTask(stop_after=6), logged, tmp_path, settings=settings, progress=False)
    other = dataclasses.replace(CONFIG, learning_rate=0.5)
    changed = {"model": {"width": 16, "layers": (1, 2)}}
    with pytest.raises(ValueError, match=r"loop\.learning_rate: 0\.001 -> 0\.5; model\.width: 8"):
        train(LineTask(), other, tmp_path, settings=changed, progress=False)
    state = train(LineTask(), other, tmp_path, settings=changed, force=True, progress=False)
    assert int(state.step) == CONFIG.num_steps


def test_a_run_does_not_go_on_with_other_data(tmp_path):
    def task(content_hash, **kwargs):
        task = LineTask(**kwargs)
        task.content_hash = content_hash
        return task

    train(task("aa", stop_after=3), CONFIG, tmp_path, progress=False)
    with pytest.raises(ValueError, match="data_hash: aa -> bb"):
        train(task("bb"), CONFIG, tmp_path, progress=False)
    assert int(train(task("aa"), CONFIG, tmp_path, progress=False).step) == CONFIG.num_steps


def test_the_time_limit_saves(tmp_path):
    config = dataclasses.replace(CONFIG, max_minutes=1e-9)
    assert int(train(LineTask(), config, tmp_path, progress=False).step) == 1
    assert int(restore(tmp_path)[0].step) == 1


def test_the_average_follows_the_weights_at_first(tmp_path):
    config = dataclasses.replace(CONFIG, num_steps=100, learning_rate=0.1)
    state = train(LineTask(), config, tmp_path, progress=False)
    start = LineTask().init(jax.random.split(jax.random.key(0))[1])["weight"]
    travelled = np.abs(state.params["weight"] - start).max()
    assert isinstance(state, TrainState)
    assert np.abs(state.ema["weight"] - state.params["weight"]).max() < 0.5 * travelled


def test_a_misspelt_setting_names_the_nearest():
    with pytest.raises(ValueError, match=r"config\.loop\.learning_rte.*'learning_rate'"):
        build_section(LoopConfig, {"num_steps": 3, "learning_rte": 1.0}, "loop")


def test_a_number_may_stand_where_a_text_is_expected():
    values = {"num_steps": 3, "warmup_steps": 0, "mesh": 2}
    assert build_section(LoopConfig, values, "loop").mesh == "2"


@pytest.mark.parametrize(
    ("name", "value"),
    [("num_steps", 1.5), ("num_steps", None), ("learning_rate", "fast"), ("mesh", 2.0),
     ("learning_rate", float("nan")), ("learning_rate", [1e-3]), ("seed", -1), ("seed", 10**30)],
)  # fmt: skip
def test_a_value_of_another_type_is_named(name, value):
    with pytest.raises(ValueError, match=rf"config\.loop\.{name}: .* came, expected "):
        build_section(LoopConfig, {"num_steps": 3, "warmup_steps": 0, name: value}, "loop")


@pytest.mark.parametrize(
    ("name", "value"),
    [("learning_rate", 1e30), ("final_learning_rate", 1.5), ("weight_decay", -0.1),
     ("ema_decay", 1.5), ("betas", (0.9, 1.0)), ("max_grad_norm", 0.0),
     ("max_minutes", -1.0), ("keep_every", -1)],
)  # fmt: skip
def test_a_setting_that_would_spoil_a_run_is_refused(name, value):
    with pytest.raises(ValueError, match=f"loop.{name} .* must be"):
        LoopConfig(num_steps=3, warmup_steps=0, **{name: value})


def failing(at, made):
    """An evaluation that notes its steps and fails at some of them."""

    def score(params, step):
        made.append(step)
        if step in at:
            raise KeyError("lips")
        return {"score": 1.0}

    return AverageEvaluation(score)


def test_an_evaluation_that_fails_stops_the_run_before_its_first_step(tmp_path):
    config, made = dataclasses.replace(CONFIG, evaluate_every=6), []
    message = r"before the first step: KeyError: 'lips' .*--config\.loop\.evaluate_every=0"
    with pytest.raises(ValueError, match=message):
        train(LineTask(), config, tmp_path, evaluations=[failing({0}, made)], progress=False)
    assert made == [0]
    with pytest.raises(ValueError, match="holds no checkpoint"):
        restore(tmp_path)


def test_an_evaluation_that_fails_later_costs_no_step(tmp_path):
    whole = train(LineTask(), CONFIG, tmp_path / "whole", progress=False)
    config, made = dataclasses.replace(CONFIG, evaluate_every=6), []
    with pytest.raises(KeyError):
        train(LineTask(), config, tmp_path, evaluations=[failing({6}, made)], progress=False)
    assert int(restore(tmp_path)[0].step) == 6
    resumed = train(LineTask(), config, tmp_path, evaluations=[failing({}, made)], progress=False)
    assert made == [0, 6, 6, 12]  # tried, failed; tried again on the same weights, made
    assert_same(resumed, whole)


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "no space left"),
        (ValueError("RESOURCE_EXHAUSTED: write: No space left on device [28]"), "no space left"),
        (OSError(errno.EROFS, "Read-only file system"), "read-only"),
    ],
)
def test_a_full_disk_is_one_line_and_the_checkpoint_before_it_is_gone_on_from(
    tmp_path, monkeypatch, error, said
):
    config = dataclasses.replace(CONFIG, num_steps=6, checkpoint_every=2)
    real = loop.save

    def save(manager, step, *rest):
        if step >= 4:
            raise error
        real(manager, step, *rest)

    monkeypatch.setattr(loop, "save", save)
    with pytest.raises(ValueError, match=rf"{said}.*step 2 is the last saved") as told:
        train(LineTask(), config, tmp_path, progress=False)
    assert str(tmp_path) in str(told.value) and "\n" not in str(told.value)
    monkeypatch.setattr(loop, "save", real)
    resumed = train(LineTask(), config, tmp_path, progress=False)
    assert_same(resumed, train(LineTask(), config, tmp_path / "whole", progress=False))


def test_other_errors_than_those_of_a_full_disk_stay_as_they_are(tmp_path):
    with pytest.raises(KeyError), explain_disk_errors(tmp_path):
        raise KeyError("a mistake")
    with (
        pytest.raises(ValueError, match="there is no checkpoint yet"),
        explain_disk_errors(tmp_path),
    ):
        raise OSError(errno.EDQUOT, "Disk quota exceeded")

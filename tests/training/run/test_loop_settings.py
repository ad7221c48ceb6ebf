"""Optimiser, averages and bookkeeping of a run are those of its settings."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_avatar.training.run.accumulate import accumulate_gradients, clip_keys
from jax_avatar.training.run.evaluation import AverageEvaluation
from jax_avatar.training.run.guards import check_update, new_guard, record_skip
from jax_avatar.training.run.loop import train
from jax_avatar.training.run.state import start_state
from jax_avatar.training.run.step import (
    LoopConfig,
    learning_rate,
    make_optimiser,
)
from jax_avatar.training.stages.task import LossTask
from tests.training.run.test_loop import CONFIG, LineTask

# No value is a default.
LOOP = LoopConfig(
    num_steps=24, learning_rate=0.2, final_learning_rate=0.25, warmup_steps=4, weight_decay=0.3,
    betas=(0.6, 0.8), max_grad_norm=0.5, ema_decay=0.3,
)  # fmt: skip
KEY = jax.random.key(1)


def test_the_rate_rises_to_its_top_and_falls_to_its_share_of_it():
    rate = learning_rate(LOOP)
    step = np.arange(25)
    fall = 0.25 + 0.75 * (1 + np.cos(np.pi * (step - 4) / 20)) / 2
    expected = 0.2 * np.where(step < 4, step / 4, fall)
    np.testing.assert_allclose([rate(s) for s in step], expected, rtol=1e-5, atol=1e-8)
    flat = dataclasses.replace(LOOP, warmup_steps=0, final_learning_rate=1.0)
    np.testing.assert_allclose([learning_rate(flat)(s) for s in step], 0.2, rtol=1e-6)


def adamw(weights, gradients, rates):
    """AdamW after clipping by the global norm, written out."""
    mean, square, moved = np.zeros_like(weights), np.zeros_like(weights), []
    for number, (gradient, rate) in enumerate(zip(gradients, rates, strict=True), 1):
        gradient = gradient * min(1, 0.5 / np.sqrt(np.square(gradient).sum()))
        mean = 0.6 * mean + 0.4 * gradient
        square = 0.8 * square + 0.2 * gradient**2
        step = (mean / (1 - 0.6**number)) / (np.sqrt(square / (1 - 0.8**number)) + 1e-8)
        weights = weights - rate * (step + 0.3 * weights)
        moved.append(weights)
    return moved


class GivenGradients(LossTask):
    """A task whose gradient is its batch."""

    name = "given"

    def __init__(self, gradients):
        self.gradients = gradients

    def init(self, key):
        return {"w": jnp.linspace(1.0, 2.0, 6).reshape(2, 3)}

    def loss(self, params, batch, key):
        return jnp.sum(params["w"] * batch["g"].mean(0)), {}

    def batches(self, step):
        return {"g": self.gradients[step]}


def test_a_step_is_adamw_at_the_rate_of_its_number_and_its_average_follows():
    rng = np.random.default_rng(0)
    gradients = rng.standard_normal((6, 4, 2, 3)).astype(np.float32)
    gradients[2] *= 1e-3  # below the clipping norm
    task = GivenGradients(gradients)
    step, state = task.make_step(LOOP), start_state(task.init(KEY), make_optimiser(LOOP))
    rates = [float(learning_rate(LOOP)(number)) for number in range(6)]
    expected = adamw(np.asarray(state.params["w"]), gradients.mean(1), rates)
    average = np.asarray(state.params["w"])
    for number, weights in enumerate(expected):
        state, metrics = step(state, task.batches(number), KEY)
        np.testing.assert_allclose(state.params["w"], weights, rtol=1e-5)
        np.testing.assert_allclose(metrics["learning_rate"], rates[number], rtol=1e-6)
        norm = np.sqrt(np.square(gradients[number].mean(0)).sum())
        np.testing.assert_allclose(metrics["grad_norm"], norm, rtol=1e-5)
        # Shorter at first: 1/10, 2/11, 3/12, then at most what is told.
        decay = min(0.3, (1 + number) / (10 + number))
        average = decay * average + (1 - decay) * weights
        np.testing.assert_allclose(state.ema["w"], average, rtol=1e-5)
    assert decay == 0.3


def test_gradients_of_parts_are_summed_in_float32():
    """One large and many small parts: in bfloat16 the small ones would be lost."""
    values = jnp.array([256.0] + [1.0] * 7, jnp.bfloat16)[:, None]

    def measure(part):
        return {"g": part.mean(0)}, {"m": part.mean()}, {"each": part[:, 0]}

    grads, means, each = accumulate_gradients(measure, values, 8)
    assert grads["g"].dtype == means["m"].dtype == jnp.float32
    np.testing.assert_allclose([grads["g"][0], means["m"]], (256 + 7) / 8)
    np.testing.assert_array_equal(each["each"], values[:, 0])


def test_every_clip_of_a_step_has_a_key_by_its_number():
    keys = np.asarray(jax.random.key_data(clip_keys(KEY, np.arange(4))))
    assert len(np.unique(keys, axis=0)) == 4
    some = jax.random.key_data(clip_keys(KEY, np.array([2, 0])))
    np.testing.assert_array_equal(some, keys[np.array([2, 0])])


class Noting(GivenGradients):
    """Its loss tells the key it was given."""

    def loss(self, params, batch, key):
        value, _ = super().loss(params, batch, key)
        return value, {"drawn": jax.random.uniform(key)}


@pytest.mark.parametrize("by_clip", [False, True])
def test_chance_is_another_in_every_step(by_clip):
    task = Noting(np.ones((2, 4, 2, 3), np.float32))
    task.by_clip = by_clip
    step, state = task.make_step(LOOP), start_state(task.init(KEY), make_optimiser(LOOP))
    drawn = []
    for number in range(2):
        state, metrics = step(state, task.batches(number), KEY)
        drawn.append(float(metrics["drawn"]))
    assert drawn[0] != drawn[1]


def test_a_batch_is_cut_into_the_parts_and_over_the_devices_that_are_told():
    seen = []

    class Watched(GivenGradients):
        def loss(self, params, batch, key):
            seen.append(len(batch["g"]))
            return super().loss(params, batch, key)

    task = Watched(np.ones((1, 4, 2, 3), np.float32))
    loop = dataclasses.replace(LOOP, accumulate=2)
    state = start_state(task.init(KEY), make_optimiser(loop))
    task.make_step(loop)(state, task.batches(0), KEY)
    assert set(seen) == {2}
    task.batch_size = 8
    for mesh, shape in (("4x2", (4, 2)), ("2x1", (2, 1)), ("", (8, 1))):
        assert tuple(task.mesh(dataclasses.replace(LOOP, mesh=mesh)).shape.values()) == shape
    with pytest.raises(ValueError, match="in 8 parts"):
        task.mesh(dataclasses.replace(LOOP, mesh="8x1", accumulate=8))


def test_only_norms_below_the_limit_pass():
    for norm, cause in ((9.99e3, 0), (1.001e4, 3)):
        grads = {"a": jnp.full((4,), norm / 2)}
        assert int(check_update(jnp.float32(0), grads)[0]) == cause
    for largest, limit, cause in ((7.1, 7.0, 1), (6.9, 7.0, 0), (-7.1, 7.0, 1), (19.9, 20.0, 0)):
        clips = jnp.zeros((1, 1, 1, 1, 2)).at[..., 1].set(largest)
        assert int(check_update(jnp.float32(0), {"a": jnp.ones(1)}, clips, limit)[0]) == cause


def test_a_skip_is_not_a_step_of_the_average():
    """Its decay grows with the updates that were made."""
    config = dataclasses.replace(LOOP, ema_decay=0.9)
    task = GivenGradients(np.ones((4, 4, 2, 3), np.float32))
    state = start_state(task.init(KEY), make_optimiser(config))
    skipped = record_skip(record_skip(new_guard(), 0, jnp.int32(2)), 1, jnp.int32(2))
    state = dataclasses.replace(state, step=jnp.int32(3), guard=skipped)
    before = np.asarray(state.ema["w"])
    after, _ = task.make_step(config)(state, task.batches(3), KEY)
    expected = 2 / 11 * before + 9 / 11 * np.asarray(after.params["w"])
    np.testing.assert_allclose(after.ema["w"], expected, rtol=1e-6)


def test_a_run_is_another_with_another_seed(tmp_path):
    config = dataclasses.replace(CONFIG, num_steps=1, warmup_steps=0, checkpoint_every=1)
    weights = {}
    for name, seed in (("a", 0), ("b", 5), ("c", 5)):
        run = train(
            LineTask(), dataclasses.replace(config, seed=seed), tmp_path / name, progress=False
        )
        weights[name] = np.asarray(run.params["weight"])
    np.testing.assert_array_equal(weights["b"], weights["c"])
    assert np.abs(weights["a"] - weights["b"]).max() > 0.1


def test_checkpoints_evaluations_and_lines_come_as_often_as_told(tmp_path):
    evaluated = []
    evaluation = AverageEvaluation(lambda params, step: evaluated.append(step) or {"score": 1.0})
    config = dataclasses.replace(
        CONFIG, num_steps=12, log_every=4, evaluate_every=3, checkpoint_every=5, keep=20
    )
    train(LineTask(), config, tmp_path, evaluations=[evaluation], progress=False)
    assert evaluated == [0, 3, 6, 9, 12]  # tried before the first step
    saved = sorted(int(p.name) for p in (tmp_path / "checkpoints").iterdir() if p.name.isdigit())
    assert saved == [3, 5, 6, 9, 10, 12]
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert sum('"loss"' in line for line in lines) == 3


def test_as_many_of_the_latest_checkpoints_stay_as_told(tmp_path):
    config = dataclasses.replace(CONFIG, num_steps=12, checkpoint_every=3, keep=2, keep_every=0)
    train(LineTask(), config, tmp_path, progress=False)
    kept = {int(p.name) for p in (tmp_path / "checkpoints").iterdir() if p.name.isdigit()}
    assert kept == {9, 12}

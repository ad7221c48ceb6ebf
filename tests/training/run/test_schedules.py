"""Learning rates follow the outer step, in both networks."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_avatar import testing
from jax_avatar.models.conditions import Conditions
from jax_avatar.training import distillation
from jax_avatar.training.distill_state import ClipBatch, DistillConfig
from jax_avatar.training.distillation import Distillation
from jax_avatar.training.rollout_plan import RolloutConfig, RolloutPlan
from jax_avatar.training.run.state import start_state
from jax_avatar.training.run.step import LoopConfig, compiled_step, learning_rate, make_optimiser
from jax_avatar.training.stages.task import LossTask

# Without memory, and with gradients of one sign, every update moves a weight by the rate.
LOOP = LoopConfig(
    num_steps=12, learning_rate=1e-2, final_learning_rate=0.1, warmup_steps=4, betas=(0.0, 0.0),
    weight_decay=0.0, max_grad_norm=1e6,
)  # fmt: skip
SETTINGS = DistillConfig(
    batch_size=1, latents=3, generator_every=3, critic_learning_rate=3e-3, max_critic_steps=4
)
KEY = jax.random.key(0)
WEIGHTS = {"w": jnp.zeros((2, 2))}


def cosine(step, rate):
    """Warm-up of 4 steps, then down to a tenth at step 12."""
    share = np.cos(np.pi * (step - 4) / 8) / 2 + 0.5
    return rate * (step / 4 if step < 4 else 0.1 + 0.9 * share)


def constant(step, rate):
    return rate * min(step / 4, 1)


SCHEDULES = {"cosine": cosine, "constant": constant}


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_schedule_warms_up_and_stays_or_falls(name):
    schedule = learning_rate(dataclasses.replace(LOOP, schedule=name))
    found = [float(schedule(step)) for step in range(13)]
    expected = [SCHEDULES[name](step, 1e-2) for step in range(13)]
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def toy_distillation(monkeypatch, loop, settings):
    batch = ClipBatch(Conditions(), jnp.arange(1))

    def gradient(bind, weights, *_):
        scores = {name: jnp.ones(1) for name in ("sigma", "critic", "teacher")}
        metrics = {"dmd_loss": jnp.float32(1), "scores": scores}
        return jax.tree.map(jnp.ones_like, weights), jnp.zeros((1, 3, 2, 2, 4)), metrics

    def velocity(params, noisy, *_):
        return jnp.zeros_like(noisy) + params["w"].sum() - 100

    monkeypatch.setattr(distillation, "gradient_of", lambda plan: gradient)
    monkeypatch.setattr(distillation, "self_forcing_batch", lambda *_, **__: None)
    monkeypatch.setattr(distillation, "generated_clips", lambda _: jnp.zeros((1, 3, 2, 2, 4)))
    monkeypatch.setattr(distillation, "clip_velocity", velocity)
    monkeypatch.setattr(distillation, "rollout_inputs", lambda *_: (None, None))
    plan = RolloutPlan(testing.NANO.replace(framepack=False), RolloutConfig())
    return Distillation(lambda p: p, lambda p: p, plan, settings, loop), batch


def updates(setup):
    parts = {"generator": distillation.update_generator, "critic": distillation.update_critic}
    return {role: jax.jit(functools.partial(part, setup)) for role, part in parts.items()}


@pytest.mark.parametrize(
    ("schedule", "critic_schedule", "critic"),
    [("cosine", "", "cosine"), ("constant", "cosine", "cosine")],
)
def test_both_networks_follow_the_outer_step(monkeypatch, schedule, critic_schedule, critic):
    """Though one is updated in every third step, and the other three times in each."""
    loop = dataclasses.replace(LOOP, schedule=schedule)
    settings = dataclasses.replace(SETTINGS, critic_schedule=critic_schedule)
    setup, batch = toy_distillation(monkeypatch, loop, settings)
    update = updates(setup)
    state = distillation.start(setup, WEIGHTS, WEIGHTS)
    state = dataclasses.replace(state, watch=dataclasses.replace(state.watch, critic_steps=3))
    for step in range(loop.num_steps):
        if settings.is_generator_step(step):
            after, metrics = update["generator"](state, batch, KEY, WEIGHTS)
            rate = SCHEDULES[schedule](step, 1e-2)
            np.testing.assert_allclose(metrics["generator_rate"], rate, rtol=1e-5)
            moved = np.abs(after.generator["w"] - state.generator["w"])
            np.testing.assert_allclose(moved, rate, rtol=1e-3)
            state = after
        after, metrics = update["critic"](state, batch, KEY, WEIGHTS)
        rate = SCHEDULES[critic](step, 3e-3)
        np.testing.assert_allclose(metrics["critic_rate"], rate, rtol=1e-5)
        moved = np.abs(after.critic["w"] - state.critic["w"])
        np.testing.assert_allclose(moved, 3 * rate, rtol=1e-3, atol=1e-9)
        state = after
    assert (int(state.critic_updates), int(state.generator_updates)) == (36, 4)


def test_each_optimiser_can_count_its_own_updates(monkeypatch):
    """The generator's ninth step is its third update: rate of count 2 of a schedule of 6."""
    loop = dataclasses.replace(LOOP, num_steps=18)
    settings = dataclasses.replace(SETTINGS, schedule_counts="updates", max_critic_steps=1)
    setup, batch = toy_distillation(monkeypatch, loop, settings)
    update = updates(setup)
    state, of_generator = (
        distillation.start(setup, WEIGHTS, WEIGHTS),
        dataclasses.replace(loop, num_steps=6),
    )
    for step in range(loop.num_steps):
        if settings.is_generator_step(step):
            rate = learning_rate(of_generator)(step // 3)
            after, metrics = update["generator"](state, batch, KEY, WEIGHTS)
            np.testing.assert_allclose(metrics["generator_rate"], rate, rtol=1e-5)
            moved = np.abs(after.generator["w"] - state.generator["w"])
            np.testing.assert_allclose(moved, rate, rtol=1e-3, atol=1e-9)
            state = after
        critic = dataclasses.replace(loop, learning_rate=3e-3)
        state, metrics = update["critic"](state, batch, KEY, WEIGHTS)
        np.testing.assert_allclose(metrics["critic_rate"], learning_rate(critic)(step), rtol=1e-5)


class LineTask(LossTask):
    """A loss of slope 1, which is no number in some steps."""

    name = "line"

    def init(self, key):
        return WEIGHTS

    def batches(self, step):
        return {"is_bad": np.full(1, step in (2, 5))}

    def loss(self, params, batch, key):
        return jnp.where(batch["is_bad"].any(), jnp.nan, 1.0) * params["w"].sum(), {}


def test_skipped_steps_do_not_hold_a_schedule_back():
    task = LineTask()
    step_fn, state = compiled_step(task, LOOP), start_state(task.init(KEY), make_optimiser(LOOP))
    for step in range(8):
        batch = task.batches(step)
        before = np.asarray(state.params["w"])
        state, metrics = step_fn(state, batch, KEY, None)
        moved = np.abs(state.params["w"] - before)
        rate = 0 if batch["is_bad"].any() else cosine(step, 1e-2)
        np.testing.assert_allclose(moved, rate, rtol=1e-3, atol=1e-9)
        np.testing.assert_allclose(metrics["learning_rate"], cosine(step, 1e-2), rtol=1e-5)


def test_a_schedule_nobody_knows_is_named():
    with pytest.raises(ValueError, match=r"loop\.schedule 'linear' must be one of cosine, const"):
        dataclasses.replace(LOOP, schedule="linear")
    with pytest.raises(ValueError, match=r"task\.critic_schedule 'linear' .* or '' for the loop's"):
        dataclasses.replace(SETTINGS, critic_schedule="linear")
    with pytest.raises(
        ValueError, match=r"task\.schedule_counts 'epochs' must be one of steps, upd"
    ):
        dataclasses.replace(SETTINGS, schedule_counts="epochs")

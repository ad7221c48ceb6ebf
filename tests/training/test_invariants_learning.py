"""Distillation of a toy: data whose scores are known, a generator that is a network."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.fft

from jax_avatar import testing
from jax_avatar.models.conditions import Conditions
from jax_avatar.training import distillation
from jax_avatar.training.distill_state import ClipBatch, DistillConfig
from jax_avatar.training.distillation import Distillation, rollout_inputs
from jax_avatar.training.rollout import generated_clips, self_forcing_batch
from jax_avatar.training.rollout_plan import RolloutConfig, RolloutPlan
from jax_avatar.training.run.step import LoopConfig

FRAMES, GRID, BATCH = 6, (4, 4), 4
MODEL = testing.NANO.replace(framepack=False, num_layers=1, ring_blocks=2)
ROLLOUT = RolloutConfig(sigmas=(1.0, 0.7, 0.0), shift_max=20)
SETTINGS = DistillConfig(
    batch_size=BATCH, latents=FRAMES, generator_every=2, critic_learning_rate=0.03,
    guidance_scale=1.0, max_critic_steps=1,
)  # fmt: skip
LOOP = LoopConfig(
    num_steps=1200, learning_rate=3e-3, final_learning_rate=0.1, warmup_steps=0, weight_decay=0.0,
    betas=(0.0, 0.999), max_grad_norm=10.0,
)  # fmt: skip

WAVES = jnp.asarray(scipy.fft.dct(np.eye(FRAMES), norm="ortho", axis=0), jnp.float32)  # k t
SLOW = np.array([3.0, 1.5, 0.5, 0.2, 0.1, 0.05])
"""Variance of the data in each of its waves in time: it moves slowly."""


class Gaussian:
    """Stands in for teacher and critic: the velocity for data of some variance per wave."""

    def __init__(self, params):
        self.variance = jnp.exp(params["log_variance"])[None, :, None, None, None]

    def bidirectional(self, noisy, timestep, conditions):
        sigma = timestep[:, :1, None, None, None] / 1000
        waves = jnp.einsum("kt,bthwc->bkhwc", WAVES, noisy)
        keep = (1 - sigma) * self.variance
        clean = keep / ((1 - sigma) * keep + sigma**2) * waves
        return (noisy - jnp.einsum("kt,bkhwc->bthwc", WAVES, clean)) / sigma


def make_batch():
    keys = jax.random.split(jax.random.key(2), 3)
    reference = jax.random.normal(keys[0], (BATCH, 1, *GRID, 4))
    features = (BATCH, 1, 4 * FRAMES, MODEL.audio_layers, MODEL.audio_width)
    text = jax.random.normal(keys[2], (BATCH, 2, MODEL.text_width))
    rows = np.arange(BATCH)
    conditions = Conditions(
        text=text, null_text=text, reference=reference, pose=reference,
        audio=jax.random.normal(keys[1], features),
    )  # fmt: skip
    return ClipBatch(conditions, rows)


def motion_of_data():
    covariance = np.asarray(WAVES).T @ np.diag(SLOW) @ np.asarray(WAVES)
    steps = np.diff(np.eye(FRAMES), axis=0)
    return np.sqrt(2 / np.pi) * np.sqrt(np.diag(steps @ covariance @ steps.T)).mean()


@pytest.mark.slow
@pytest.mark.parametrize("rate", [LOOP.learning_rate])
def test_the_student_moves_as_much_as_the_data(rate):
    network = testing.make_network(MODEL)
    loop, batch = dataclasses.replace(LOOP, learning_rate=rate), make_batch()
    generator, plan = network.bind, RolloutPlan(MODEL, ROLLOUT)

    def student(params):  # generator or critic
        return (Gaussian if "log_variance" in params else generator)(params)

    setup = Distillation(student, Gaussian, plan, SETTINGS, loop)
    update_critic = functools.partial(distillation.update_critic, setup)
    update_generator = functools.partial(distillation.update_generator, setup)
    teacher = {"log_variance": jnp.log(jnp.asarray(SLOW, jnp.float32))}
    state = distillation.start(setup, network.params, {"log_variance": jnp.zeros(FRAMES)})
    key = jax.random.key(3)

    @jax.jit
    def train(state):
        def two_steps(state, _):
            state, _ = update_critic(state, batch, key, teacher)
            state, _ = update_generator(state, batch, key, teacher)
            state, metrics = update_critic(state, batch, key, teacher)
            return state, metrics["loss"]

        return jax.lax.scan(two_steps, state, None, length=LOOP.num_steps // 20)

    @jax.jit
    def motion(params):
        inputs, net = rollout_inputs(setup, batch, jax.random.key(7)), generator(params)
        made = generated_clips(self_forcing_batch(net, net, *inputs, 1, plan))
        return jnp.mean(jnp.abs(jnp.diff(made, axis=1)))

    relative = [float(motion(state.generator)) / motion_of_data()]
    for _ in range(10):
        state, _ = train(state)
        relative.append(float(motion(state.generator)) / motion_of_data())
    assert abs(relative[0] - 1) > 0.4, relative
    assert abs(relative[-1] - 1) < 0.2, relative

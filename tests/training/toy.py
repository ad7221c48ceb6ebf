"""Distillation of networks of a few weights: all but the networks is the code of training.

clip = a row of weights + noise / 10           velocity = a row of weights + loudness of speech
"""

import dataclasses
import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np

from jax_avatar import testing
from jax_avatar.models.cache import History, Sink
from jax_avatar.models.conditions import Conditions
from jax_avatar.training import blockwise, distillation, rollout, scores
from jax_avatar.training.distill_state import ClipBatch, DistillConfig
from jax_avatar.training.distillation import Distillation
from jax_avatar.training.rollout import Trace
from jax_avatar.training.rollout_plan import RolloutConfig, RolloutPlan
from jax_avatar.training.run.step import LoopConfig

MODEL = testing.NANO.replace(framepack=False)
CLIPS, CHANNELS, GRID, LATENTS = 64, 4, (2, 2), 6
KEY = jax.random.key(3)
# No two rates, counts, decays or bounds are alike, and none is a default.
ROLLOUT = RolloutConfig(sigmas=(1.0, 0.9, 0.6, 0.0), shift_max=20)
SETTINGS = DistillConfig(
    batch_size=CLIPS, latents=LATENTS, generator_every=3, critic_learning_rate=3e-4,
    guidance_scale=3.0, timestep_shift=3.0, sigma_bounds=(0.4, 0.6), gradient_limit=0.65,
    clean_limit=7.0, ema_start=7, max_critic_steps=1,
)  # fmt: skip
LOOP = LoopConfig(
    num_steps=40, learning_rate=2e-3, final_learning_rate=1.0, warmup_steps=4, betas=(0.0, 0.9),
    weight_decay=0.0, max_grad_norm=0.5, ema_decay=0.7,
)  # fmt: skip


def params(value):
    """Weights of a network; the bias never acts."""
    return {"w": jnp.full((1, CHANNELS), float(value)), "b": jnp.full((CHANNELS,), float(value))}


def weight(params):
    """The value of all weights that act."""
    return float(params["w"][0, 0])


BASE = params(-1)


def make_batch(seed=0):
    """Conditions of a batch, those of every clip its own."""
    keys = jax.random.split(jax.random.key(seed), 4)
    conditions = Conditions(
        text=jax.random.normal(keys[0], (CLIPS, 2, MODEL.text_width)),
        null_text=jax.random.normal(keys[3], (CLIPS, 2, MODEL.text_width)),
        reference=jax.random.normal(keys[1], (CLIPS, 1, *GRID, CHANNELS)),
        audio=jax.random.normal(keys[2], (CLIPS, 1, 4 * LATENTS, 2, 6)),
        pose=jnp.zeros((CLIPS, 1, *GRID, CHANNELS)),
    )
    return ClipBatch(conditions, np.arange(CLIPS, dtype=np.int32))


asked, _rollouts, _keys = [], [], []  # while an update is traced


def put_in_place(monkeypatch):
    """Puts rollouts of such networks in place, and records what they and the draws are given."""
    monkeypatch.setattr(rollout, "self_forcing", _self_forcing)
    monkeypatch.setattr(blockwise, "exit_block", _exit_block)
    batch = distillation.self_forcing_batch
    monkeypatch.setattr(distillation, "self_forcing_batch", _noted(batch))
    monkeypatch.setattr(blockwise, "self_forcing_batch", _noted(batch))
    for module, name in (
        (distillation, "rollout_inputs"),
        (distillation, "sample_exit_step"),
        (distillation, "sample_noise"),
        (scores, "sample_noise"),
    ):
        monkeypatch.setattr(module, name, _keyed(getattr(module, name)))


def make(settings=SETTINGS, loop=LOOP, **changes):
    """A distillation of such networks; changes are those of `settings`."""
    settings = dataclasses.replace(settings, **changes)
    return Distillation(_Network, _Network, RolloutPlan(MODEL, ROLLOUT), settings, loop)


def start(setup=None, generator=0.5, critic=2.0):
    """The state before the first step; no two networks are alike."""
    return distillation.start(setup or make(), params(generator), params(critic))


def update(name, state, setup=None):
    """One update of "generator" or "critic".

    Returns:
        With `state` and `metrics` after it, and what happened on the way: `asked`, the questions to
        score networks in order (`params`, `noisy`, `timestep`, `text`, `reference`, `features`),
        `rollouts` (`params`, `draws`, `exit_step`), and `keys`, those of everything drawn.
    """
    return SimpleNamespace(**_compiled(setup or make(), name)(state, make_batch()))


def run(setup, state, steps, every=SETTINGS.generator_every):
    """State and metrics after each of some outer steps; the generator's turn comes `every` ones."""
    for number in range(1, steps + 1):
        metrics = {}
        if number % every == 0:
            made = update("generator", state, setup)
            state, metrics = made.state, made.metrics
        made = update("critic", state, setup)
        state = made.state
        yield state, metrics | made.metrics


@functools.cache
def _compiled(setup, name):
    @jax.jit
    def call(state, batch):
        for notes in (asked, _rollouts, _keys):
            notes.clear()
        after, metrics = getattr(distillation, f"update_{name}")(setup, state, batch, KEY, BASE)
        found = dict(state=after, metrics=metrics)
        if setup.settings.max_critic_steps > 1 or setup.loop.accumulate > 1:
            return found  # what is noted within a loop is no result
        if name == "critic":  # differentiated where it is asked
            asked[:] = [{**question, "params": state.critic} for question in asked]
        keys = jax.random.key_data(jnp.stack(_keys))
        return found | dict(asked=[*asked], rollouts=[*_rollouts], keys=keys)

    return call


class _Network:
    def __init__(self, params):
        self.params = params

    def bidirectional(self, noisy, timestep, given):
        names = ("params", "noisy", "timestep", "text", "reference", "features")
        values = (self.params, noisy, timestep, given.text, given.reference, given.audio)
        asked.append(dict(zip(names, values, strict=True)))
        return _everywhere(self.params, noisy) + loudness(given.audio)


def loudness(features):
    """Of every clip, ready to broadcast."""
    return jnp.abs(features).mean((1, 2, 3, 4))[:, None, None, None, None]


def _self_forcing(net, frozen, conditions, draws, exit_step, plan, *, keeps_history=True):
    clean = _everywhere(net.params, draws.noise) + 0.1 * draws.noise
    empty = jnp.zeros(len(draws.noise))
    return Trace(draws.noise, clean, History(empty, empty), Sink(*[empty] * 4))


def _exit_block(net, trace, conditions, draws, exit_step, plan, g):
    start = trace.start[g]
    return _everywhere(net.params, start) + 0.1 * start


def _everywhere(params, like):
    return jnp.broadcast_to(params["w"][0], like.shape)


def _noted(real):
    def call(net, frozen, conditions, draws, exit_step, plan, **options):
        _rollouts.append(dict(params=net.params, draws=draws, exit_step=exit_step))
        return real(net, frozen, conditions, draws, exit_step, plan, **options)

    return call


def _keyed(real):
    def call(*arguments):
        _keys.extend(a for a in arguments if str(getattr(a, "dtype", "")).startswith("key<"))
        return real(*arguments)

    return call

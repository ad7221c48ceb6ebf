"""Distillation of networks of a few weights: all but the networks is the code of training.

clip = a row of weights + noise / 10           velocity = a row of weights + loudness of speech
"""

import dataclasses
import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np

from jax_avatar.models.cache import Sink
from jax_avatar.training import distillation
from jax_avatar.training.distill_state import DistillConfig, Told
from jax_avatar.training.distillation import Distiller
from jax_avatar.training.rollout import Generator, RolloutConfig, Trace
from jax_avatar.training.run.step import LoopConfig
from tests import nano

MODEL = nano.CONFIG.replace(framepack=False)
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


def make_told(seed=0):
    """Conditions of a batch, those of every clip its own."""
    keys = jax.random.split(jax.random.key(seed), 4)
    return Told(
        text=jax.random.normal(keys[0], (CLIPS, 2, MODEL.text_width)),
        null_text=jax.random.normal(keys[3], (CLIPS, 2, MODEL.text_width)),
        reference=jax.random.normal(keys[1], (CLIPS, 1, *GRID, CHANNELS)),
        features=jax.random.normal(keys[2], (CLIPS, 1, 4 * LATENTS, 2, 6)),
        pose=jnp.zeros((CLIPS, 1, *GRID, CHANNELS)),
        row=np.arange(CLIPS, dtype=np.int32),
    )


_asked, _rollouts, _keys = [], [], []  # while an update is traced


def put_in_place(monkeypatch):
    """Puts such networks in the place of the transformer, and notes what they are given."""
    monkeypatch.setattr(distillation, "merge", _Network)
    monkeypatch.setattr(Generator, "rollout", _rollout)
    monkeypatch.setattr(Generator, "exit_block", _exit_block)
    for name, first in (("roll_out", 1), ("clip_gradient", 2)):
        monkeypatch.setattr(distillation, name, _noted(getattr(distillation, name), first))
    for name in ("_clips", "_noise", "_exit_step"):
        monkeypatch.setattr(Distiller, name, _keyed(getattr(Distiller, name)))


def make(settings=SETTINGS, loop=LOOP, **changes):
    """A distiller of such networks; changes are those of `settings`."""
    settings = dataclasses.replace(settings, **changes)
    return Distiller(Generator("student", MODEL, ROLLOUT), "teacher", settings, loop)


def start(distiller=None, generator=0.5, critic=2.0):
    """The state before the first step; no two networks are alike."""
    return (distiller or make()).start(params(generator), params(critic))


def update(name, state, distiller=None):
    """One update of "generator" or "critic".

    Returns:
        With `state` and `metrics` after it, and what happened on the way: `asked`, the questions to
        score networks in order (`params`, `noisy`, `timestep`, `text`, `reference`, `features`),
        `rollouts` (`params`, `draws`, `exit_step`), and `keys`, those of everything drawn.
    """
    return SimpleNamespace(**_compiled(distiller or make(), name)(state, make_told()))


def run(distiller, state, steps, every=SETTINGS.generator_every):
    """State and metrics after each of some outer steps; the generator's turn comes `every` ones."""
    for number in range(1, steps + 1):
        metrics = {}
        if number % every == 0:
            made = update("generator", state, distiller)
            state, metrics = made.state, made.metrics
        made = update("critic", state, distiller)
        state = made.state
        yield state, metrics | made.metrics


@functools.cache
def _compiled(distiller, name):
    @jax.jit
    def call(state, told):
        for notes in (_asked, _rollouts, _keys):
            notes.clear()
        after, metrics = getattr(distiller, f"update_{name}")(state, told, KEY, BASE)
        found = dict(state=after, metrics=metrics)
        if distiller.settings.max_critic_steps > 1 or distiller.loop.accumulate > 1:
            return found  # what is noted within a loop is no result
        if name == "critic":  # differentiated where it is asked
            _asked[:] = [{**question, "params": state.critic} for question in _asked]
        keys = jax.random.key_data(jnp.stack(_keys))
        return found | dict(asked=[*_asked], rollouts=[*_rollouts], keys=keys)

    return call


class _Network:
    def __init__(self, graphdef, params):
        self.params = params

    def bidirectional(self, noisy, timestep, given):
        names = ("params", "noisy", "timestep", "text", "reference", "features")
        features = given.audio
        values = (self.params, noisy, timestep, given.text, given.reference, features)
        _asked.append(dict(zip(names, values, strict=True)))
        return _everywhere(self.params, noisy) + loudness(features)


def loudness(features):
    """Of every clip, ready to broadcast."""
    return jnp.abs(features).mean((1, 2, 3, 4))[:, None, None, None, None]


def _rollout(self, params, clip, draws, exit_step, *, keeps_history=True):
    clean = _everywhere(params, draws.noise) + 0.1 * draws.noise
    empty = jnp.zeros(len(draws.noise))
    return Trace(draws.noise, clean, empty, empty, Sink(*[empty] * 4))


def _exit_block(self, params, trace, clip, draws, exit_step, number):
    start = trace.start[number]
    return _everywhere(params, start) + 0.1 * start


def _everywhere(params, like):
    return jnp.broadcast_to(params["w"][0], like.shape)


def _noted(real, first):
    def call(generator, *arguments, **options):
        params, _, draws, exit_step = arguments[first - 1 : first + 3]
        _rollouts.append(dict(params=params, draws=draws, exit_step=exit_step))
        return real(generator, *arguments, **options)

    return call


def _keyed(real):
    def call(distiller, *arguments):
        _keys.extend(a for a in arguments if str(getattr(a, "dtype", "")).startswith("key<"))
        return real(distiller, *arguments)

    return call

"""A rollout does as its settings say, seen through a network whose keys are what it is given.

velocity = 1 + mean noise level of the past     key = the block as given     value = its level
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_avatar import testing
from jax_avatar.models.cache import KVCache, Sink
from jax_avatar.models.conditions import Conditions
from jax_avatar.training.blockwise import gradient_of
from jax_avatar.training.corrupt import make_corrupt
from jax_avatar.training.rollout import self_forcing
from jax_avatar.training.rollout_plan import RolloutConfig, RolloutPlan, sample_randomness

MODEL = testing.NANO.replace(framepack=False, ring_blocks=2)
BLOCKS, SHAPE = 3, (1, 3, 8, 8, 4)
SIGMAS = (1.0, 0.75, 0.25, 0.0)
SETTINGS = RolloutConfig(sigmas=SIGMAS, sink_distance=(8, 11), shift_max=5)
KEY = jax.random.key(2)


class Network:
    def __init__(self, params):
        self.bias = params["bias"]

    def prefill(self, conditions):
        part, text = jnp.ones((1, 1, 1, 1, 16)), conditions.text
        return Sink(part, 2 * part, text, text)

    def project_prompt(self, text):
        return text, text

    def block_after(self, latent, timestep, conditions, past, sink, position):
        b, t, h, w, c = latent.shape
        own = latent.reshape(1, b, t * h * w // 4, 1, 4 * c)
        level = jnp.broadcast_to(timestep[0, 0] / 1000, own.shape)
        velocity = jnp.broadcast_to(self.bias + 1 + past(0)[1].mean(), latent.shape)
        return velocity, KVCache(own, level)


def make_draws(settings, seed=2):
    return sample_randomness(jax.random.key(seed), settings, BLOCKS, SHAPE)


def make_clip():
    features = jnp.zeros((1, 1, 12 * BLOCKS, 2, 6))
    text, reference = jnp.zeros((1, 1, 4)), jnp.zeros((1, 1, *SHAPE[2:]))
    return Conditions(text=text, reference=reference, pose=jnp.zeros(SHAPE), audio=features)


def roll(exit_step=2, **changes):
    """A rollout, its draws, and keys and values as blocks, `N b t h w c`."""
    settings = dataclasses.replace(SETTINGS, **changes)
    plan, draws = RolloutPlan(MODEL, settings), make_draws(settings)
    net = Network({"bias": jnp.float32(0)})
    run = jax.jit(lambda clip, draws: self_forcing(net, net, clip, draws, exit_step, plan))
    trace = run(make_clip(), draws)
    parts = (trace.history.key, trace.history.value)
    return trace, draws, *(np.asarray(part).reshape(trace.clean.shape) for part in parts)


def independent(*noises, limit=0.15):
    noises = [np.asarray(noise).ravel() for noise in noises]
    return np.abs(np.corrcoef(noises) - np.eye(len(noises))).max() < limit


# ---- history ------------------------------------------------------------------------------


def test_every_step_sees_history_at_its_own_level():
    trace, draws, keys, levels = roll()
    np.testing.assert_array_equal(keys, trace.start)
    np.testing.assert_allclose(levels, 0.25)
    moved = trace.start - draws.noise
    # Down by 0.25 from level 1, by 0.5 from 0.75, and the exit by 0.25 from 0.25.
    np.testing.assert_allclose(moved[0], -0.75, atol=1e-5)
    np.testing.assert_allclose(moved[1:], -0.25 * 2 - 0.5 * 1.75, atol=1e-5)
    left = np.asarray(trace.clean - trace.start)
    np.testing.assert_allclose(left[0], -0.25, atol=1e-5)
    np.testing.assert_allclose(left[1:], -0.25 * 1.25, atol=1e-5)


def test_with_one_history_every_step_sees_that_of_the_exit():
    trace, draws, _, _ = roll(cache="exit_only")
    np.testing.assert_allclose((trace.start - draws.noise)[1:], -0.75 * 1.25, atol=1e-5)


def test_a_clean_history_is_that_of_the_finished_block():
    trace, _, keys, levels = roll(refresh="clean")
    np.testing.assert_allclose(keys, trace.clean, atol=1e-6)
    np.testing.assert_array_equal(levels, 0)


def test_a_fixed_history_is_noised_anew_to_its_level():
    trace, draws, keys, levels = roll(refresh="fixed", refresh_sigma=0.4)
    np.testing.assert_allclose(levels, 0.4, rtol=1e-6)
    noise = (keys - 0.6 * np.asarray(trace.clean)) / 0.4
    assert abs(noise.std() - 1) < 0.05
    assert independent(*noise, *draws.noise)


def test_renoising_takes_new_noise_for_every_block_and_step():
    starts = []
    for exit_step in (1, 2):
        trace, draws, _, _ = roll(exit_step, sampler="renoise")
        starts.append(np.asarray(trace.start))
    # The first step predicts noise - 1 (2 where there is a past) from level 1, and noises it.
    past = np.array([1.0, 2, 2])[:, None, None, None, None, None]
    first = (starts[0] - 0.25 * (draws.noise - past)) / 0.75
    clean = starts[0] - 0.75 * (past - np.array([0, 0.25, 0.25]).reshape(past.shape))
    second = (starts[1] - 0.75 * clean) / 0.25
    assert abs(first.std() - 1) < 0.05 and abs(second.std() - 1) < 0.05
    assert independent(*draws.noise, *first, *second)


# ---- noise on keys and values -------------------------------------------------------------


@pytest.mark.parametrize("on", RolloutConfig.CHOICES["kv_noise_on"])
def test_keys_and_values_get_noise_relative_to_their_size_where_told(on):
    corrupt, draws = make_corrupt(0.3, on), make_draws(SETTINGS)
    # Two layers and two clips of different size.
    size = jnp.array([[1.0, 3], [5, 9]])[:, :, None, None, None]
    own = KVCache(*(jnp.broadcast_to(n * size, (2, 2, 200, 1, 16)) for n in (1, 2)))
    noises = []
    for number, step in ((0, 0), (1, 0), (0, 1)):
        corrupted = corrupt(own, draws.corrupt_key(number, step))
        for name, chosen in (("key", on in "k both"), ("value", on in "v both")):
            part = getattr(own, name)
            noise = np.asarray((getattr(corrupted, name) - part) / part)
            assert noise.any() == chosen
            if chosen:
                np.testing.assert_allclose(noise.std((2, 3, 4)), 0.3, rtol=0.06)
                noises += list(noise.reshape(4, -1))
    assert independent(*noises)
    silent = dataclasses.replace(own, key=0 * own.key)
    assert corrupt(silent, draws.corrupt_key(0, 0)).key.any() == 0


@pytest.mark.parametrize("on_sink", [False, True])
def test_the_sink_gets_noise_if_told(on_sink):
    trace, _, keys, levels = roll(1, kv_noise=0.2, kv_noise_sink=on_sink)
    assert (trace.sink.key != 1).any() == (trace.sink.value != 2).any() == on_sink
    noise = (levels - 0.75) / 0.75
    assert abs(noise.std() - 0.2) < 0.02
    other = keys - np.asarray(trace.start)
    assert other.std() == pytest.approx(0.2 * float(trace.start.std()), rel=0.2)
    assert independent(*noise, *other)


# ---- ranges -------------------------------------------------------------------------------


def test_places_are_drawn_from_their_whole_ranges():
    settings = dataclasses.replace(SETTINGS, sink_distance=(8, 11), shift_max=5)
    keys = jax.random.split(KEY, 400)
    many = jax.vmap(lambda key: sample_randomness(key, settings, 2, (1, 1, 2, 2, 1)))(keys)
    assert set(np.unique(many.distance)) == {8, 9, 10, 11}
    assert set(np.unique(many.first_frame)) == set(range(6))
    # Of every block, of every step and of the refresh one of its own.
    drawn = np.moveaxis(np.asarray(many.distance, float), 0, -1).reshape(2 * 4, 400)
    assert independent(*drawn, many.first_frame, limit=0.2)


def test_nothing_in_the_draws_of_a_clip_shares_a_key(monkeypatch):
    keys = []
    for name in ("normal", "randint"):
        real = getattr(jax.random, name)

        def noted(key, *arguments, real=real, **options):
            keys.append(key)
            return real(key, *arguments, **options)

        monkeypatch.setattr(jax.random, name, noted)
    draws = make_draws(SETTINGS)
    keys += [draws.renoise_key, draws.history_key]
    data = np.stack([jax.random.key_data(key) for key in keys])
    assert len(data) == len(np.unique(data, axis=0)) == 5


# ---- the gradient --------------------------------------------------------------------------


@pytest.mark.parametrize("gradient", RolloutConfig.CHOICES["gradient"])
def test_exits_are_repeated_one_by_one_or_differentiated_in_the_rollout(gradient):
    """Only the former can tell how well it repeated them."""
    plan = RolloutPlan(MODEL, dataclasses.replace(SETTINGS, gradient=gradient))
    one = make_clip(), make_draws(SETTINGS)
    clips, draws = jax.tree.map(lambda leaf: leaf[None], one)

    def score(clips):
        return jnp.ones_like(clips), {}

    def run(weights):
        return gradient_of(plan)(Network, weights, clips, draws, 1, plan, score)

    grads, generated, metrics = jax.jit(run)({"bias": jnp.float32(0)})
    np.testing.assert_allclose(grads["bias"], -0.75 * generated.size, rtol=1e-5)
    assert ("replay_error" in metrics) == (gradient == "blocks")

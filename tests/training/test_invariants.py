"""What must hold between the forms of the network, and what the gradient must not contain."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_avatar import testing
from jax_avatar.diffusion.flow import noise_from_velocity
from jax_avatar.diffusion.step import move
from jax_avatar.models.cache import History, block_position, empty_cache
from jax_avatar.models.conditions import Conditions
from jax_avatar.models.dit import DiT
from jax_avatar.models.portrait_dit import PortraitDiT
from jax_avatar.streaming.plan import StreamPlan
from jax_avatar.streaming.state import add_context
from jax_avatar.training import rollout_plan
from jax_avatar.training.distill_state import ClipBatch, DistillConfig
from jax_avatar.training.dmd import generator_gradient
from jax_avatar.training.rollout import ClipDenoiser, concat_blocks, exit_block, self_forcing
from jax_avatar.training.rollout_plan import RolloutConfig, RolloutPlan, sample_randomness
from jax_avatar.training.run.guards import check_update
from jax_avatar.training.scores import score_gradient

GRID, BLOCKS = (4, 4), 2
MODEL = testing.NANO.replace(framepack=False, num_layers=2, ring_blocks=2)
ONE_LAYER = MODEL.replace(num_layers=1)
SETTINGS = RolloutConfig(sigmas=(1.0, 0.9, 0.6, 0.0), shift_max=1000)
FRAMES = MODEL.frames_per_block


@functools.cache
def network(config=MODEL, kind=DiT):
    return testing.make_network(config, kind=kind)


def make_clip(blocks=BLOCKS, seed=0):
    keys = jax.random.split(jax.random.key(seed), 4)
    audio = (1, 1, 4 * FRAMES * blocks, MODEL.audio_layers, MODEL.audio_width)
    return Conditions(
        text=jax.random.normal(keys[0], (1, 2, MODEL.text_width)),
        reference=jax.random.normal(keys[1], (1, 1, *GRID, 4)),
        audio=jax.random.normal(keys[2], audio),
        pose=jax.random.normal(keys[3], (1, FRAMES, *GRID, 4)),
    )


def make_draws(blocks=BLOCKS, settings=SETTINGS):
    return sample_randomness(jax.random.key(5), settings, blocks, (1, FRAMES, *GRID, 4))


def difference(left, right):
    def norm(tree):
        leaves = [np.asarray(leaf, np.float64) for leaf in jax.tree.leaves(tree)]
        return np.sqrt(sum(np.square(leaf).sum() for leaf in leaves))

    return norm(jax.tree.map(lambda a, b: a - b, left, right)) / norm(right)


# ---- the gradient ---------------------------------------------------------------------------

EXIT = 1
PLAN = RolloutPlan(MODEL, SETTINGS)


def bind(params, config=MODEL):
    return network(config).bind(params)


def roll(clip, draws, exit_step, config=MODEL):
    return rollout_of(config)(network(config).params, clip, draws, exit_step)


@functools.cache
def rollout_of(config):
    plan = RolloutPlan(config, SETTINGS)

    @jax.jit
    def run(params, clip, draws, exit_step):
        net = bind(params, config)
        return self_forcing(net, net, clip, draws, exit_step, plan)

    return run


@functools.cache
def rolled():
    """A rollout, and the slope of a loss that is not linear in its clip."""
    clip, draws = make_clip(), make_draws()
    trace = roll(clip, draws, EXIT)
    return clip, draws, trace, jnp.sin(3 * trace.clean)


def make_pull():
    """`(slope of a block, its number) -> gradient of its exit step`, compiled once."""
    clip, draws, trace, _ = rolled()

    @jax.jit
    def pull(slope, number):
        def exits(params):
            return exit_block(bind(params), trace, clip, draws, EXIT, PLAN, number)

        return jax.vjp(exits, network().params)[1](slope)[0]

    return pull


def summed(pull, slope):
    grads = [pull(slope[number], jnp.int32(number)) for number in range(BLOCKS)]
    return jax.tree.map(lambda *leaves: sum(leaves), *grads)


@functools.cache
def right_gradient():
    return summed(make_pull(), rolled()[3])


@functools.cache
def chained_gradients():
    """The gradient of all exit steps after each other, history detached and not."""
    clip, draws, trace, slope = rolled()

    def loss(params, is_detached):
        history, total = jax.tree.map(jnp.zeros_like, trace.history), 0.0
        denoiser = ClipDenoiser(PLAN, clip, draws, trace.sink)
        for number in range(BLOCKS):
            clean, kv = denoiser.exit(bind(params), trace.start[number], history, number, EXIT)
            total += jnp.sum(slope[number] * clean)
            # The same numbers either way: only the gradient knows.
            detached = jax.lax.stop_gradient(kv)
            kv = jax.tree.map(lambda d, a: jnp.where(is_detached, d, a), detached, kv)
            history = history.append(kv, number)
        return total

    run = jax.jit(jax.grad(loss))
    return [run(network().params, jnp.array(is_detached)) for is_detached in (True, False)]


def test_the_gradient_knows_whether_history_is_detached():
    detached, attached = chained_gradients()
    assert difference(detached, right_gradient()) < 1e-5
    assert difference(attached, right_gradient()) > 1e-2


def test_the_gradient_knows_whether_a_block_sees_itself(monkeypatch):
    """Algorithm 2 as printed leaves a block's own keys and values in its history."""
    last, position_in = History.last, rollout_plan.position_in

    def with_own(history, count, number, step=None):
        return last(history, count, number + 1, step)

    def one_more(*args, **kwargs):
        position = position_in(*args, **kwargs)
        filled = jnp.minimum(position.filled + 1, MODEL.ring_blocks)
        return dataclasses.replace(position, filled=filled)

    monkeypatch.setattr(History, "last", with_own)
    monkeypatch.setattr(rollout_plan, "position_in", one_more)
    assert difference(summed(make_pull(), rolled()[3]), right_gradient()) > 1e-2


def test_the_gradient_knows_over_what_it_is_normalised():
    clean = concat_blocks(rolled()[2].clean)
    fake, real = jax.random.normal(jax.random.key(1), (2, *clean.shape))
    real = real * jnp.linspace(0.5, 1.5, clean.shape[1])[None, :, None, None, None]
    pull, grads = make_pull(), []
    for normalizer in ("clip", "block"):
        slope = generator_gradient(clean, fake, real, normalizer=normalizer)
        blocks = slope.reshape(BLOCKS, 1, FRAMES, *GRID, 4)
        grads.append(summed(pull, blocks))
    assert difference(*grads) > 1e-2


# ---- the forms of the network ---------------------------------------------------------------


def speech(blocks):
    """Features that change in every video frame."""
    return make_clip(blocks).audio


def block_causal(config, noisy, timestep, features, *, kind=DiT, context="block_reset", **options):
    run, params = causal_form(config, kind, context), network(config, kind).params
    return run(params, noisy, timestep, features, options)


@functools.cache
def causal_form(config, kind, context):
    clip, made = make_clip(), network(config, kind)

    @jax.jit
    def run(params, noisy, timestep, features, options):
        pose = jnp.tile(clip.pose, (1, noisy.shape[1] // FRAMES, 1, 1, 1))
        told = Conditions(text=clip.text, reference=clip.reference, pose=pose, audio=features)
        past_blocks, dit = config.ring_blocks - 1, made.bind(params)
        return dit.block_causal(
            noisy, timestep, told, past_blocks=past_blocks, audio_context=context, **options
        )

    return run


@pytest.mark.parametrize(
    ("kind", "ring_blocks", "context"),
    [
        (DiT, 2, "block_reset"),
        (DiT, 5, "block_reset"),
        (DiT, 2, "clip"),
        (PortraitDiT, 2, "block_reset"),
    ],
)
def test_the_training_form_is_prefill_and_streaming(kind, ring_blocks, context):
    """Every block at its own noise level, the reference at one place, a window that rolls."""
    config, blocks, reference_frame = MODEL.replace(ring_blocks=ring_blocks), 6, 35
    clip, dit = make_clip(), network(config, kind).bind()
    noisy = jax.random.normal(jax.random.key(2), (1, FRAMES * blocks, *GRID, 4))
    levels = jnp.array([1000.0, 125, 900, 400, 777, 300])
    timestep, features = jnp.repeat(levels, FRAMES)[None], speech(blocks)
    whole = block_causal(
        config, noisy, timestep, features, kind=kind, context=context,
        reference_frame=reference_frame,
    )  # fmt: skip

    step = jax.jit(dit.stream_block)
    told = Conditions(text=clip.text, reference=clip.reference, pose=clip.pose)
    sink = jax.jit(dit.prefill)(told)
    cache, plan, earlier = empty_cache(config, 1, *GRID), StreamPlan(audio_context=context), None
    for block in range(blocks):
        frames = slice(FRAMES * block, FRAMES * (block + 1))
        position = block_position(config, block, reference_frame - frames.start)
        block_features = features[:, :, 4 * frames.start : 4 * frames.stop]
        heard, earlier = add_context(plan, block_features, earlier)
        velocity, cache = step(
            noisy[:, frames], timestep[:, frames], told.with_audio(heard), cache, sink, position
        )
        # A velocity made of a clean prediction has the prediction's error over its level.
        sigma = levels[block] / 1000 if kind is PortraitDiT else 1.0
        np.testing.assert_allclose(sigma * velocity, sigma * whole[:, frames], atol=1e-5)


def changed_blocks(before, after):
    """Which blocks differ, `[b (N t) h w c]` both."""
    change = np.abs(np.asarray(after) - np.asarray(before)).reshape(-1, FRAMES, *GRID, 4)
    return [bool(block.max() > 0) for block in change]


def test_one_layer_sees_its_window_and_nothing_else():
    """Block 1 of 5 is seen by itself and the next one, where blocks see one of the past."""
    noisy = jax.random.normal(jax.random.key(2), (1, 5 * FRAMES, *GRID, 4))
    timestep, features = jnp.full((1, 5 * FRAMES), 500.0), speech(5)
    other, louder = noisy.at[:, FRAMES : 2 * FRAMES].add(1.0), features.at[:, :, 12:24].add(1.0)
    told = ((noisy, features), (other, features), (noisy, louder))
    before, *made = (block_causal(ONE_LAYER, x, timestep, heard) for x, heard in told)
    assert changed_blocks(before, made[0]) == [False, True, True, False, False]
    assert changed_blocks(before, made[1]) == [False, True, False, False, False]

    clip, draws = make_clip(5), make_draws(5)
    before = concat_blocks(roll(clip, draws, 0, ONE_LAYER).clean)
    louder = clip.with_audio(clip.audio.at[:, :, 12:24].add(1.0))
    assert changed_blocks(before, concat_blocks(roll(louder, draws, 0, ONE_LAYER).clean)) == [
        False, True, False, False, False,
    ]  # fmt: skip
    noisier = dataclasses.replace(draws, noise=draws.noise.at[1].add(1.0))
    assert changed_blocks(before, concat_blocks(roll(clip, noisier, 0, ONE_LAYER).clean)) == [
        False, True, True, False, False,
    ]  # fmt: skip
    # Later steps see what earlier steps saw, so it goes further there, but never back.
    before, after = (concat_blocks(roll(clip, d, 2, ONE_LAYER).clean) for d in (draws, noisier))
    assert changed_blocks(before, after) == [False, True, True, True, True]


def test_moving_everything_in_time_changes_nothing():
    clip, draws = make_clip(), make_draws()
    made = [
        roll(clip, dataclasses.replace(draws, first_frame=jnp.int32(frame)), 2).clean
        for frame in (40, 900, 3)
    ]
    np.testing.assert_allclose(made[0], made[1], atol=1e-5)
    # Near the start the reference cannot be as close as it is asked to be.
    assert np.abs(made[0] - made[2]).max() > 1e-4


def test_moving_a_training_clip_with_its_reference_changes_nothing():
    noisy = jax.random.normal(jax.random.key(2), (1, 3 * FRAMES, *GRID, 4))
    timestep, features = jnp.full((1, 3 * FRAMES), 500.0), speech(3)
    made = [
        block_causal(MODEL, noisy, timestep, features, first_frame=at, reference_frame=ref)
        for at, ref in ((0, 25), (1003, 1028), (0, 28))
    ]
    np.testing.assert_allclose(made[0], made[1], atol=1e-5)
    assert np.abs(made[0] - made[2]).max() > 1e-4


def test_renoising_with_the_predicted_noise_is_eulers_step():
    latent, velocity = jax.random.normal(jax.random.key(0), (2, 1, 3, *GRID, 4))
    for sigma, following in jnp.array([(1.0, 0.9), (0.6, 0.25), (0.02, 0.0)]):
        noise = noise_from_velocity(latent, velocity, sigma)
        renoised = move(latent, velocity, sigma, following, noise)
        np.testing.assert_allclose(renoised, move(latent, velocity, sigma, following), atol=1e-6)


# ---- a clip that the teacher agrees with ----------------------------------------------------


def test_an_update_without_a_normaliser_is_small_and_made():
    """The teacher predicts the clip itself: the normaliser is zero. So does the critic in part."""
    made = jax.random.normal(jax.random.key(0), (2, 2 * FRAMES, *GRID, 4))
    away = jnp.zeros_like(made).at[..., :2].set(1.0)

    class Network:
        def __init__(self, away):
            self.away = away

        def bidirectional(self, noisy, timestep, conditions):
            return (noisy - made - self.away) / (timestep[:, :, None, None, None] / 1000)

    settings, clip = DistillConfig(batch_size=2, latents=2 * FRAMES), make_clip(2)
    conditions = dataclasses.replace(clip, null_text=clip.text, pose=clip.pose[:, :1])
    slope, metrics = score_gradient(
        *(Network(away), Network(0 * away), made, ClipBatch(conditions, np.arange(2))),
        *(jax.random.key(1), settings),
        frames_per_block=FRAMES,
    )
    assert metrics["normalizer"] < 1e-5
    limit = settings.gradient_limit / made.size
    np.testing.assert_allclose(jnp.abs(slope[..., :2]), limit, rtol=1e-6)
    assert jnp.abs(slope[..., 2:]).max() < 0.01 * limit
    cause, norm = check_update(metrics["dmd_loss"], {"clips": slope}, made)
    assert int(cause) == 0 and np.isfinite(norm)

"""Distillation does as its settings say, where no two of them are alike and none is a default."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_avatar.training.dmd import score_level
from jax_avatar.training.scores import sample_noise, score_gradient
from tests.training import toy
from tests.training.toy import LOOP, ROLLOUT, SETTINGS, make, make_batch, run, start, update, weight

RATES = {"generator": LOOP.learning_rate, "critic": SETTINGS.critic_learning_rate}
ROLES = pytest.mark.parametrize("name", RATES)


@pytest.fixture(autouse=True)
def toy_networks(monkeypatch):
    toy.put_in_place(monkeypatch)


def wide(clips):
    return np.asarray(clips)[:, None, None, None, None]


def noise_of(rollout):
    """Where its blocks started, `[clips t h w c]`."""
    noise = np.asarray(rollout["draws"].noise)[:, :, 0]
    return noise.reshape(len(noise), -1, *noise.shape[3:])


def clips_of(rollout):
    return weight(rollout["params"]) + 0.1 * noise_of(rollout)


def levels_of(found):
    """Noise level of every clip, the same in all questions and all frames."""
    first = found.asked[0]
    for question in found.asked:
        timestep = np.asarray(question["timestep"])
        np.testing.assert_array_equal(timestep, np.asarray(first["timestep"][:, :1]) + 0 * timestep)
        np.testing.assert_array_equal(question["noisy"], first["noisy"])
    return np.asarray(first["timestep"])[:, 0] / 1000


def noise_added(found):
    (rollout,), sigma = found.rollouts, wide(levels_of(found))
    return (np.asarray(found.asked[0]["noisy"]) - (1 - sigma) * clips_of(rollout)) / sigma


# ---- rates and counters -------------------------------------------------------------------


def test_both_networks_learn_at_their_own_rate_and_warm_up_in_outer_steps():
    """Where every gradient is alike, an update without momentum is the learning rate."""
    made, state = make(), start(critic=100.0)  # far away: the gradients hardly change
    moved = {name: [] for name in RATES}
    for after, _ in run(made, state, 9):
        for name, moves in moved.items():
            moves.append(abs(weight(getattr(after, name)) - weight(getattr(state, name))))
        state = after
    warm = np.minimum(np.arange(9) / LOOP.warmup_steps, 1)
    is_turn = np.arange(9) % 3 == 2
    np.testing.assert_allclose(moved["generator"], is_turn * warm * RATES["generator"], rtol=2e-2)
    np.testing.assert_allclose(moved["critic"], warm * RATES["critic"], rtol=2e-2)
    counts = (state.step, state.critic_updates, state.generator_updates)
    assert [int(count) for count in counts] == [9, 9, 3]
    assert [made.settings.is_generator_step(step) for step in range(6)] == 2 * [False, False, True]


@ROLES
def test_both_optimisers_have_the_loops_betas_decay_and_clipping(name):
    loop = dataclasses.replace(
        LOOP, warmup_steps=0, betas=(0.3, 0.8), weight_decay=0.5, max_grad_norm=0.25
    )
    made, state = make(loop=loop), start(critic=100.0)
    found = update(name, state, made)
    leaves = jax.tree.leaves(
        getattr(found.state, f"{name}_optimiser"), is_leaf=lambda part: hasattr(part, "nu")
    )
    (adam,) = [part for part in leaves if hasattr(part, "nu")]
    assert found.metrics[f"{name}_norm"] > 0.3  # before clipping
    np.testing.assert_allclose(np.linalg.norm(adam.mu["w"]), (1 - 0.3) * 0.25, rtol=1e-5)
    np.testing.assert_allclose(adam.nu["w"].sum(), (1 - 0.8) * 0.25**2, rtol=1e-5)
    before, after = getattr(state, name), getattr(found.state, name)
    moved = RATES[name] * (np.sign(adam.mu["w"]) + 0.5 * before["w"])
    np.testing.assert_allclose(after["w"], before["w"] - moved, rtol=1e-6)
    np.testing.assert_array_equal(after["b"], before["b"])  # no decay of what has one axis


def test_the_average_starts_at_its_step_and_keeps_its_decay():
    """The third update of the generator, in step 8 of 0.., is the first one from step 7 on."""
    state, seen = start(), []
    for after, _ in run(make(), state, 15):
        old, new, own = (weight(tree) for tree in (state.ema, after.ema, after.generator))
        if own == weight(state.generator):
            assert new == old
        else:
            seen.append("copy" if new == own else "lag")
            expected = own if seen[-1] == "copy" else 0.7 * old + 0.3 * own
            np.testing.assert_allclose(new, expected, rtol=1e-6)
            assert after.ema_started == (len(seen) >= 3)
        state = after
    assert seen == ["copy", "copy", "copy", "lag", "lag"]


# ---- chance --------------------------------------------------------------------------------


def test_every_exit_occurs_in_the_rollouts_of_both():
    metrics = [metrics for _, metrics in run(make(), start(), 64, every=1)]
    exits = {name: [int(m[f"{name}_exit"]) for m in metrics] for name in RATES}
    for drawn in exits.values():
        assert set(drawn) == set(range(1, ROLLOUT.num_steps + 1))
        assert min(drawn.count(exit_step) for exit_step in drawn) > 10
    assert exits["generator"] != exits["critic"]
    # Clips of the last exit are watched; reviews are further apart than these steps.
    state = list(run(make(), start(), 20, every=1))[-1][0]
    assert int(state.watch.clips["count"]) == toy.CLIPS * exits["critic"][:20].count(3)


def test_nothing_that_is_drawn_shares_a_key():
    """Clips, noise of the scores and exit; of both networks; in two steps; in no layout twice."""
    keys = []
    for step in range(2):
        state = dataclasses.replace(start(), step=jnp.int32(step))
        keys += [key for name in RATES for key in update(name, state).keys]
    assert len(keys) == 2 * 2 * 3
    assert len(np.unique(keys, axis=0)) == len(keys)


def test_level_and_noise_of_a_clip_share_no_key(monkeypatch):
    keys = []
    for name in ("normal", "randint"):
        real = getattr(jax.random, name)

        def noted(key, *arguments, real=real, **options):
            jax.debug.callback(lambda data: keys.append(tuple(data)), jax.random.key_data(key))
            return real(key, *arguments, **options)

        monkeypatch.setattr(jax.random, name, noted)
    clips = jnp.zeros((8, toy.LATENTS, *toy.GRID, toy.CHANNELS))
    jax.jit(sample_noise, static_argnums=3)(toy.KEY, clips, np.arange(8), SETTINGS)
    jax.effects_barrier()
    assert len(keys) == len({tuple(map(int, key)) for key in keys}) == 2 * 8


def test_repeated_updates_of_the_critic_have_their_own_chance():
    """In the first step of a warm-up nothing moves: with the same chance, losses were equal."""
    made, losses = make(max_critic_steps=3), []
    for count in (1, 2, 3):
        state = start()
        watch = dataclasses.replace(state.watch, critic_steps=jnp.int32(count))
        state = dataclasses.replace(state, watch=watch)
        losses.append(float(update("critic", state, made).metrics["loss"]))
    assert len(set(losses)) == 3


@ROLES
def test_noise_levels_are_drawn_per_clip_within_their_bounds(name):
    found = update(name, start())
    levels = levels_of(found)
    low, high = np.float32(SETTINGS.sigma_bounds)
    np.testing.assert_allclose([levels.min(), levels.max()], [low, high], rtol=1e-6)
    within = levels[(levels > low + 1e-4) & (levels < high - 1e-4)]
    assert len(np.unique(within)) > 5
    # Monitors sort them into four bins, equal before the shift by 3.
    bins = np.histogram(levels / (3 - 2 * levels), [0, 0.25, 0.5, 0.75, 1])[0]
    if name == "critic":
        shares = [found.metrics[f"level_bin{i}"] for i in range(4)]
        np.testing.assert_allclose(shares, bins / len(levels), atol=1e-6)
    else:
        np.testing.assert_array_equal(found.state.watch.teacher > 0, bins > 0)
    assert 0 < bins[0] < len(levels)
    drawn = 1000 * within / (3 - 2 * within)  # before the shift by 3
    np.testing.assert_allclose(drawn, np.round(drawn), atol=1e-3)
    np.testing.assert_allclose(score_level(jnp.int32(250), 3.0, (0.4, 0.6)), 0.5, rtol=1e-6)


@ROLES
def test_clips_are_scored_under_noise_that_nothing_else_had(name):
    found = update(name, start())
    noise = noise_added(found)
    assert abs(noise.std() - 1) < 0.05 and abs(noise.mean()) < 0.05
    for other in (noise_of(found.rollouts[0]), np.roll(noise, 1, 0), np.roll(noise, 1, 1)):
        assert abs(np.corrcoef(noise.ravel(), other.ravel())[0, 1]) < 0.1


def test_generator_and_critic_learn_from_different_clips():
    generator, critic = (update(name, start()) for name in RATES)
    assert (levels_of(generator) != levels_of(critic)).any()
    for of in (noise_added, lambda found: noise_of(found.rollouts[0])):
        assert np.abs(of(generator) - of(critic)).max() > 0.1


# ---- who learns from whom ----------------------------------------------------------------


def test_the_critic_learns_from_the_generator_not_from_its_average():
    state = dataclasses.replace(start(), ema=toy.params(5.0))
    (rollout,) = update("critic", state).rollouts
    assert weight(rollout["params"]) == weight(state.generator) == 0.5


def test_the_critic_predicts_velocities_of_the_generators_clips():
    found = update("critic", start())
    (question,), noise = found.asked, noise_added(found)
    velocity = 2.0 + toy.loudness(question["features"])
    error = velocity - (noise - clips_of(found.rollouts[0]))
    np.testing.assert_allclose(found.metrics["loss"], np.square(error).mean(), rtol=1e-4)
    assert weight(question["params"]) == 2.0
    given = make_batch().conditions
    expected = {"text": given.text, "reference": given.reference, "features": given.audio}
    for name, value in expected.items():
        np.testing.assert_array_equal(question[name], value)


def test_the_generator_is_pulled_from_the_critic_to_the_guided_teacher():
    """The teacher is asked twice; without speech and with the negative prompt the second time."""
    state, given = dataclasses.replace(start(), ema=toy.params(5.0)), make_batch().conditions
    found = update("generator", state)
    assert [weight(question["params"]) for question in found.asked] == [2.0, -1.0, -1.0]
    silence = jnp.zeros_like(given.audio)
    expected = [(given.text, given.audio)] * 2 + [(given.null_text, silence)]
    for question, (text, features) in zip(found.asked, expected, strict=True):
        np.testing.assert_array_equal(question["text"], text)
        np.testing.assert_array_equal(question["features"], features)
        np.testing.assert_array_equal(question["reference"], given.reference)
    (rollout,) = found.rollouts
    assert weight(rollout["params"]) == 0.5

    clips, sigma = clips_of(rollout), wide(levels_of(found))
    fake, cond, null = (
        weight(question["params"]) + toy.loudness(question["features"]) for question in found.asked
    )
    real = found.asked[0]["noisy"] - sigma * (cond + 2 * (cond - null))
    distance = np.abs(clips - real).mean((1, 2, 3, 4), keepdims=True)
    gradient = (found.asked[0]["noisy"] - sigma * fake - real) / distance
    assert np.abs(gradient).max() > SETTINGS.gradient_limit > np.abs(gradient).min()
    gradient = np.clip(gradient, -SETTINGS.gradient_limit, SETTINGS.gradient_limit)
    expected = {
        "normalizer": distance.mean(),
        "dmd_gradient": np.abs(gradient).mean(),
        "dmd_loss": 0.5 * np.square(gradient).mean(),
    }
    for name, value in expected.items():
        np.testing.assert_allclose(found.metrics[name], value, rtol=1e-4)


def test_the_normaliser_is_that_of_a_clip_or_of_a_block():
    """Blocks five times as large are pulled as strongly, or a fifth as strongly."""
    clips = jnp.ones((toy.CLIPS, toy.LATENTS, *toy.GRID, toy.CHANNELS))
    clips = clips * jnp.repeat(jnp.array([1.0, 5.0]), 3)[None, :, None, None, None]
    ratio = {}
    for kind in ("clip", "block"):
        setup = make(gradient_limit=1e6, normalizer=kind)
        networks = setup.student(toy.params(2.0)), setup.teacher(toy.BASE)

        @jax.jit
        def gradient(clips, batch, networks=networks, settings=setup.settings):
            return score_gradient(*networks, clips, batch, toy.KEY, settings, frames_per_block=3)

        slope, _ = gradient(clips, make_batch())
        size = np.abs(slope).mean((2, 3, 4))
        ratio[kind] = np.median(size[:, 5] / size[:, 0])
    assert ratio["clip"] == pytest.approx(1, abs=0.01) and ratio["block"] < 0.5


# ---- limits and layout -------------------------------------------------------------------


@ROLES
@pytest.mark.parametrize(("size", "skipped"), [(6.0, 0), (8.0, 1)])
def test_updates_on_clips_beyond_the_limit_are_skipped(name, size, skipped):
    found = update(name, start(generator=size))
    assert found.state.guard.skipped.tolist() == [skipped, 0, 0]
    assert int(getattr(found.state, f"{name}_updates")) == 1 - skipped


def test_a_batch_in_parts_learns_the_same():
    parts = make(loop=dataclasses.replace(LOOP, accumulate=4))
    for name in RATES:
        whole, found = (update(name, start(), made) for made in (make(), parts))
        for one, other in zip(*map(jax.tree.leaves, (whole.state, found.state)), strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-6)
        assert len(toy.asked[-1]["noisy"]) == toy.CLIPS // 4  # as traced


def test_monitors_are_reviewed_as_often_as_told_and_add_critic_steps_up_to_the_limit():
    """This critic is far worse than the teacher and lags at every review."""
    made = make(monitor_every=2, max_critic_steps=3)
    found = list(run(made, start(critic=9.0), 7, every=1))
    reviewed = [bool(np.isfinite(metrics["monitor/gap"])) for _, metrics in found]
    assert reviewed == [False, True] * 3 + [False]
    steps = [1, 1, 2, 2, 3, 3, 3]
    assert [int(metrics["critic_steps"]) for _, metrics in found] == steps
    assert int(found[-1][0].critic_updates) == sum(steps)

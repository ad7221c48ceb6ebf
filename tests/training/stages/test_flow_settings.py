"""Stage 1 does as its settings say: how often, how much, how far, and nothing together."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_avatar.models.portrait_dit import PortraitDiT
from jax_avatar.training.stages.flow import ForcingConfig, ForcingTask
from tests.training.stages.test_flow import KEY, MODEL, SETTINGS, make_clips, make_task

MANY = 4000


def drawn(method, *arguments, **changes):
    """What a task with other settings draws."""
    task = make_task(dataclasses.replace(SETTINGS, **changes))
    return [np.asarray(part) for part in jax.tree.leaves(getattr(task, method)(KEY, *arguments))]


def test_a_batch_has_as_many_clips_as_long_as_told():
    task = make_task(dataclasses.replace(SETTINGS, batch_size=5, latents=3))
    batch = task.batches(0)
    assert batch["latent"].shape[:2] == (5, 3) and batch["features"].shape[:3] == (5, 1, 12)
    assert task.batch_size == 5
    assert len(task.batches(0, np.arange(2))["latent"]) == 2


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_levels_are_shifted_as_told_and_rescaled_above_the_smallest(shift):
    (sigma,) = drawn("sigmas", MANY, 6, shift=shift, shared_share=0.25, smallest_sigma=0.2)
    level = (sigma - 0.2) / 0.8
    level = level / (shift - (shift - 1) * level)  # before the shift
    np.testing.assert_allclose(1000 * level, np.round(1000 * level), atol=5e-2)
    assert level.min() == pytest.approx(1e-3, abs=1e-4) and level.max() == pytest.approx(1)
    assert level.mean() == pytest.approx(0.5, abs=0.02)
    np.testing.assert_array_equal(sigma[:, :3], sigma[:, :1] + 0 * sigma[:, :3])
    shared = (sigma[:, 0] == sigma[:, 3]).mean()
    assert shared == pytest.approx(0.25, abs=0.03)


def test_a_level_lies_in_every_latent_of_its_block():
    """The noisy clip that the network is given has the level that it is told."""
    task = make_task(dataclasses.replace(SETTINGS, shared_share=0.0, reference_noise=0.0))
    batch = jax.tree.map(jnp.asarray, task.batches(0))
    given = {}

    def velocity(params, noisy, sigma, told, key):
        given.update(noisy=noisy, sigma=sigma)
        return jnp.zeros_like(noisy)

    task.velocity = velocity
    loss, metrics = task.loss({}, batch, KEY)
    sigma = np.asarray(given["sigma"])[:, :, None, None, None]
    noise = (given["noisy"] - (1 - sigma) * batch["latent"]) / sigma
    assert abs(noise.std() - 1) < 0.1 and len(np.unique(sigma)) == 4
    square = np.square(noise - batch["latent"]).mean(-1)
    weight = 1 + 4 * np.asarray(batch["mouth"])
    np.testing.assert_allclose(loss, (square * weight).sum() / weight.sum(), rtol=1e-4)
    clean = np.square(given["noisy"] - batch["latent"]).mean(-1)
    high = (sigma[..., 0] > 0.8) * np.ones_like(clean)
    inside = np.asarray(batch["mouth"])
    for name, value, where in (
        ("mouth_error", square, inside),
        ("clean_error_high", clean, high),
        ("mouth_error_high", clean, high * inside),
    ):
        np.testing.assert_allclose(metrics[name], (value * where).sum() / where.sum(), rtol=1e-4)


def test_an_error_at_the_mouth_counts_as_often_as_told(monkeypatch):
    """Two of sixteen cells: the same error there weighs 5 * 2 of 14 + 5 * 2, elsewhere 14."""
    batch = jax.tree.map(jnp.asarray, make_task().batches(0))
    for weight in (1.0, 5.0):
        task = make_task(dataclasses.replace(SETTINGS, mouth_weight=weight))
        losses = []
        for where in (batch["mouth"], 1 - batch["mouth"]):

            def velocity(params, noisy, sigma, told, key, where=where):
                exact = (noisy - batch["latent"]) / sigma[:, :, None, None, None]
                return exact + where[..., None]

            monkeypatch.setattr(task, "velocity", velocity)
            losses.append(float(task.loss({}, batch, KEY)[0]))
        share = float(batch["mouth"].mean())
        total = weight * share + 1 - share
        np.testing.assert_allclose(losses, [weight * share / total, (1 - share) / total], rtol=1e-4)


@pytest.mark.parametrize("weight", ForcingConfig.CHOICES["weight"])
def test_the_weight_of_a_level_is_in_the_loss(weight, monkeypatch):
    task = make_task(dataclasses.replace(SETTINGS, weight=weight, mouth_weight=1.0))
    batch, seen = jax.tree.map(jnp.asarray, task.batches(0)), []

    def velocity(params, noisy, sigma, told, key):
        seen.append(sigma)
        return (noisy - batch["latent"]) / sigma[:, :, None, None, None] + 1

    monkeypatch.setattr(task, "velocity", velocity)
    loss = float(task.loss({}, batch, KEY)[0])
    np.testing.assert_allclose(loss, task.level_weight(seen[0]).mean(), rtol=1e-5)
    assert (loss == pytest.approx(1)) == (weight == "uniform")


def test_lips_that_are_read_count_as_told_where_speech_is_heard():
    found = {}
    for weight in (0.2, 0.4):
        settings = dataclasses.replace(SETTINGS, mouth_probe_weight=weight, audio_dropout=0.0)
        task = make_task(settings)
        task.velocity = lambda params, noisy, sigma, told, key: jnp.zeros_like(noisy)
        batch = jax.tree.map(jnp.asarray, task.batches(0))
        loss, metrics = task.loss({}, batch, KEY)
        assert metrics["probe"] > 0
        np.testing.assert_allclose(loss - metrics["flow"], weight * metrics["probe"], rtol=1e-3)
        found[weight] = float(metrics["probe"])
    assert found[0.2] == pytest.approx(found[0.4])
    task = make_task(dataclasses.replace(settings, audio_dropout=1.0))
    task.velocity = lambda params, noisy, sigma, told, key: jnp.zeros_like(noisy)
    assert task.loss({}, batch, KEY)[1]["probe"] == 0


def test_each_condition_is_dropped_as_often_as_told_and_for_itself():
    shares = {"audio_dropout": 0.2, "text_dropout": 0.5, "reference_dropout": 0.7}
    task = make_task(dataclasses.replace(SETTINGS, reference_noise=0.0, **shares))
    batch = {
        "features": jnp.ones((MANY, 1, 4, 1, 1)),
        "text": jnp.ones((MANY, 1, 1)),
        "null_text": jnp.full((MANY, 1, 1), 7.0),
        "reference": jnp.ones((MANY, 1, 1, 1, 1)),
    }
    left, heard = task.dropped_conditions(batch, KEY)
    names = ("audio", "text", "reference")
    kept = {name: np.asarray(getattr(left, name)).reshape(MANY, -1)[:, 0] == 1 for name in names}
    np.testing.assert_array_equal(kept["audio"], heard)
    for name, share in zip(names, shares.values(), strict=True):
        assert kept[name].mean() == pytest.approx(1 - share, abs=0.03)
    assert set(np.unique(left.text)) == {1, 7}  # the negative prompt, not silence
    together = np.corrcoef(np.stack([kept[name] for name in names]))
    assert np.abs(together - np.eye(3)).max() < 0.06


def test_the_portraits_noise_is_at_most_as_told_and_of_its_own_strength_in_every_clip():
    task = make_task(dataclasses.replace(SETTINGS, reference_noise=0.3))
    batch = {
        "features": jnp.ones((400, 1, 4, 1, 1)),
        "text": jnp.ones((400, 1, 1)),
        "null_text": jnp.ones((400, 1, 1)),
        "reference": jnp.full((400, 1, 8, 8, 4), 2.0),
    }
    spread = np.asarray(task.dropped_conditions(batch, KEY)[0].reference).std((1, 2, 3, 4))
    assert 0.25 < spread.max() < 0.34 and spread.min() < 0.02
    assert spread.mean() == pytest.approx(0.15, abs=0.01)


def test_clips_start_and_portraits_stand_within_their_ranges():
    first, face = drawn("places", 400, shift_max=7, reference_frames=(13, 15))
    assert set(first) == set(range(8)) and set(face - first) == {13, 14, 15}
    assert abs(np.corrcoef(first, face - first)[0, 1]) < 0.15


def test_nothing_in_the_loss_shares_a_key(monkeypatch):
    """Noise, levels, their sharing, what is dropped, the portrait's noise, places."""
    keys, real = [], {name: getattr(jax.random, name) for name in ("normal", "uniform", "randint")}

    def noted(name):
        def call(key, *arguments, **options):
            keys.append(tuple(np.asarray(jax.random.key_data(key)).ravel().tolist()))
            return real[name](key, *arguments, **options)

        return call

    task = make_task()
    for name in real:
        monkeypatch.setattr(jax.random, name, noted(name))
    task.velocity = lambda params, noisy, sigma, told, key: (
        0 * noisy + sum(place.sum() for place in task.places(key, len(noisy)))
    )
    task.loss({}, jax.tree.map(jnp.asarray, task.batches(0)), KEY)
    assert len(keys) == len(set(keys)) == 10


def test_the_order_of_the_clips_is_that_of_the_seed():
    def order(seed):
        task = ForcingTask(MODEL, SETTINGS, make_clips(6, 6), network=PortraitDiT, seed=seed)
        return np.concatenate([task.batches(step)["lip_gap"][:, 0] for step in range(3)])

    np.testing.assert_array_equal(order(1), order(1))
    assert set(order(1)) == set(order(2)) and (order(1) != order(2)).any()

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_avatar.data.encode import mouth_cells
from jax_avatar.data.latents import LatentClips
from jax_avatar.models.conditions import Conditions
from jax_avatar.models.dit import DiT
from jax_avatar.models.portrait_dit import PortraitDiT
from jax_avatar.testing import NANO
from jax_avatar.training.run.state import start_state
from jax_avatar.training.run.step import LoopConfig, make_optimiser
from jax_avatar.training.stages.flow import ForcingConfig, ForcingTask
from jax_avatar.training.stages.mouth_reader import fit_mouth_reader

MODEL = NANO.replace(audio_history=1, framepack=False)
KEY = jax.random.key(11)
SETTINGS = ForcingConfig(
    batch_size=2, latents=6, shift=2.0, shared_share=0.5, smallest_sigma=0.4,
    reference_noise=0.05, mouth_weight=5.0,
)  # fmt: skip


def make_task(settings=SETTINGS, clips=None, network=PortraitDiT, **changes):
    model = dataclasses.replace(MODEL, **changes)
    clips = clips or make_clips()
    return ForcingTask(model, settings, clips, network=network, pose="reference")


def make_clips(count=4, frames=9, seed=0):
    rng = np.random.default_rng(seed)
    reference = rng.standard_normal((count, 1, 4, 4, 4))
    gap = rng.random((count, 4 * frames)).astype(np.float32)
    mouth = np.zeros((count, frames, 4, 4), bool)
    mouth[:, :, 2:4, 1:3] = True
    change = np.zeros((count, frames, 4, 4, 4))
    change[:, :, 2:4, 1:3] = gap.reshape(count, frames, 1, 1, 4)
    return LatentClips(
        latent=(reference + change).astype(np.float16),
        reference=reference.astype(np.float16),
        features=rng.standard_normal((count, 4 * frames, 2, 6)).astype(np.float16),
        mouth=mouth,
        lip_gap=gap,
        person=np.arange(count),
    )


def with_head(params):
    """The output layer starts at zero and would hide everything."""
    kernel = params["head"]["kernel"]
    return params | {
        "head": params["head"] | {"kernel": 0.1 * jax.random.normal(KEY, kernel.shape)}
    }


@pytest.mark.slow
def test_the_loss_falls_on_one_batch():
    settings = dataclasses.replace(SETTINGS, mouth_probe_weight=0.1)
    task = make_task(settings, make_clips(2, 6))
    loop = LoopConfig(num_steps=80, learning_rate=5e-3, warmup_steps=5)
    state = start_state(task.init(jax.random.key(0)), make_optimiser(loop))
    step, batch = task.make_step(loop), task.batches(0)
    losses = []
    for _ in range(loop.num_steps):
        state, metrics = step(state, batch, jax.random.key(1))
        losses.append(float(metrics["loss"]))
    assert np.mean(losses[-10:]) < 0.3 * np.mean(losses[:10])


@pytest.mark.parametrize("shared", [0.0, 1.0])
def test_noise_levels_are_equal_inside_a_block_and_shared_between_blocks_on_demand(shared):
    task = make_task(dataclasses.replace(SETTINGS, shared_share=shared))
    sigma = np.asarray(task.sigmas(jax.random.key(3), 64, 6)).reshape(64, 2, 3)
    assert (sigma == sigma[:, :, :1]).all()
    assert ((sigma[:, 0] == sigma[:, 1]).all()) == bool(shared)
    assert SETTINGS.smallest_sigma <= sigma.min() and sigma.max() <= 1
    assert np.median(sigma) > 0.6  # shifted toward noise


def test_before_training_the_clean_prediction_is_the_portrait():
    task = make_task()
    params, batch = task.init(jax.random.key(0)), task.batches(0)
    clean, sigma = jnp.asarray(batch["latent"]), 0.7
    noise = jax.random.normal(jax.random.key(1), clean.shape)
    noisy = (1 - sigma) * clean + sigma * noise
    portrait = jnp.broadcast_to(batch["reference"], clean.shape)
    velocity = task.transformer.bind(params).block_causal(
        noisy,
        jnp.full(clean.shape[:2], 1000 * sigma),
        Conditions(
            text=jnp.zeros((2, 1, 4)),
            reference=jnp.asarray(batch["reference"]),
            pose=portrait,
            audio=jnp.asarray(batch["features"]),
        ),
    )
    np.testing.assert_allclose(noisy - sigma * velocity, portrait, atol=1e-5)


def test_an_exact_velocity_costs_nothing_and_a_wrong_one_its_square(monkeypatch):
    task = make_task()
    batch = jax.tree.map(jnp.asarray, task.batches(0))
    for error in (0.0, 0.5):

        def velocity(params, noisy, sigma, told, key, error=error):
            return (noisy - batch["latent"]) / sigma[:, :, None, None, None] + error

        monkeypatch.setattr(task, "velocity", velocity)
        np.testing.assert_allclose(task.loss({}, batch, KEY)[0], error**2, atol=1e-6)


@pytest.mark.parametrize(
    ("dropout", "given", "field"),
    [
        ("audio_dropout", "features", "audio"),
        ("text_dropout", "text", "text"),
        ("reference_dropout", "reference", "reference"),
    ],
)
def test_what_is_dropped_does_not_matter(dropout, given, field):
    batch = jax.tree.map(jnp.asarray, make_task().batches(0))
    batch["text"] = batch["text"] + 1
    for share in (0.0, 1.0):
        task = make_task(dataclasses.replace(SETTINGS, reference_noise=0.0, **{dropout: share}))
        key = jax.random.key(2)
        left, heard = task.dropped_conditions(batch, key)
        other, _ = task.dropped_conditions({**batch, given: batch[given] - 1}, key)
        assert np.array_equal(getattr(left, field), getattr(other, field)) == (share == 1)
        assert heard.all() == (dropout != "audio_dropout" or share == 0)
        others = {"audio", "text", "reference"} - {field}
        assert all(np.array_equal(getattr(left, name), getattr(other, name)) for name in others)
    np.testing.assert_array_equal(getattr(left, field), 0)


@pytest.mark.parametrize(
    ("network", "form", "context", "seen", "heard"),
    [
        (DiT, "block_causal", "block_reset", [1, 2], [1]),
        (PortraitDiT, "block_causal", "block_reset", [1, 2], [1]),
        (DiT, "block_causal", "clip", [1, 2], [1, 2]),
        (PortraitDiT, "bidirectional", "block_reset", [0, 1, 2, 3], [1, 2]),
    ],
)
def test_a_block_sees_a_window_of_the_past_and_a_teacher_everything(
    network, form, context, seen, heard
):
    """One layer, one block of the past; the second block of two clips is changed."""
    settings = dataclasses.replace(SETTINGS, latents=12, form=form, audio_context=context)
    task = make_task(settings, make_clips(2, 12), network, num_layers=1, ring_blocks=2)
    params, batch = with_head(task.init(jax.random.key(0))), task.batches(0)
    given = task.conditions(jax.tree.map(jnp.asarray, batch), KEY)
    sigma, latent = jnp.full((2, 12), 0.7), jax.random.normal(KEY, batch["latent"].shape)
    velocity = jax.jit(lambda latent, given: task.velocity(params, latent, sigma, given, KEY))
    louder = given.with_audio(given.audio.at[:, :, 12:24].add(1.0))
    others = (velocity(latent.at[:, 3:6].add(1.0), given), velocity(latent, louder))
    for other, blocks in zip(others, (seen, heard), strict=True):
        change = np.abs(other - velocity(latent, given)).reshape(2, 4, -1).max((0, 2))
        assert np.flatnonzero(change).tolist() == blocks


@functools.cache
def scaffolded():
    settings = dataclasses.replace(SETTINGS, motion_frames="scaffold")
    clips = make_clips(2, 26)
    return make_task(settings, clips, DiT, framepack=True, num_layers=1)


def test_motion_latents_are_seen_and_move_with_the_clip():
    task = scaffolded()
    params, batch = with_head(task.init(jax.random.key(0))), task.batches(0)
    given = task.conditions(jax.tree.map(jnp.asarray, batch), jax.random.key(2))
    assert given.motion.shape[1] == batch["motion"].shape[1] == 19
    task.places = lambda first, b: (first, first + 25)
    sigma, latent = jnp.full((2, 6), 0.7), jax.random.normal(KEY, batch["latent"].shape)

    @jax.jit
    def velocity(motion, first):
        moved = dataclasses.replace(given, motion=motion)
        return task.velocity(params, latent, sigma, moved, first)

    here = velocity(given.motion, jnp.array([0, 0]))
    np.testing.assert_allclose(velocity(given.motion, jnp.array([0, 700])), here, atol=1e-5)
    other = velocity(given.motion.at[:, -1].add(1.0), jnp.array([0, 0]))
    assert np.abs(other - here).reshape(2, 2, -1).max(2).min() > 1e-4  # both blocks of both


def test_every_motion_latent_has_a_noise_level_of_its_own():
    """Far from the origin the mean of a noised latent tells its level."""
    task, motion = scaffolded(), 1e4 * jnp.ones((200, 19, 1, 1, 4))
    made = task.scaffold({"motion": motion}, KEY)
    sigma = 1 - np.asarray(made).mean((2, 3, 4)) / 1e4
    assert 0 <= sigma.min() < 0.01 and 0.99 < sigma.max() <= 1.001
    assert abs(sigma.mean() - 0.5) < 0.02
    assert np.abs(np.corrcoef(sigma.T) - np.eye(19)).max() < 0.35
    still = np.asarray(task.scaffold({"motion": 0 * motion}, KEY))
    np.testing.assert_allclose(still.std((0, 2, 3, 4)), np.sqrt((sigma**2).mean(0)), rtol=0.15)


def test_without_a_scaffold_nothing_comes_before_the_clip():
    task = make_task()
    batch = jax.tree.map(jnp.asarray, task.batches(0))
    assert "motion" not in batch
    given, _ = task.dropped_conditions(batch | {"motion": batch["latent"]}, KEY)
    assert given.motion is None
    with pytest.raises(ValueError, match=r"needs the network's motion packer; .*model\.framepack"):
        make_task(scaffolded().settings, make_clips(2, 26), DiT)
    with pytest.raises(ValueError, match=r"is for task\.form='block_causal', 'bidirectional'"):
        dataclasses.replace(scaffolded().settings, form="bidirectional")
    with pytest.raises(ValueError, match=r"19 latents before the 6 of a window.*none"):
        make_task(scaffolded().settings, make_clips(2, 24), DiT, framepack=True)


def test_the_portrait_follows_the_clip_or_stays():
    settings = dataclasses.replace(SETTINGS, shift_max=1003, reference_frames=(22, 30))
    first, face = make_task(settings).places(KEY, 400)
    assert set(np.asarray(face - first)) == set(range(22, 31))
    assert first.min() < 50 and 950 < first.max() <= 1003
    first, face = make_task(dataclasses.replace(settings, sink="fixed")).places(KEY, 400)
    assert (face == MODEL.reference_frame).all() and np.unique(first).size > 100


def test_levels_of_the_paper_are_a_thousand_shifted_ones():
    settings = dataclasses.replace(SETTINGS, shift=5.0, shared_share=0.0, smallest_sigma=0.0)
    sigma = np.asarray(make_task(settings, network=DiT).sigmas(KEY, 4000, 9))[:, ::3]
    level = sigma / (5 - 4 * sigma)
    np.testing.assert_allclose(1000 * level, np.round(1000 * level), atol=2e-3)
    assert 0 < level.min() < 2e-3 and level.max() == 1
    assert abs(level.mean() - 0.5) < 0.01 and abs(np.corrcoef(sigma.T)[0, 1]) < 0.05


def test_weights_of_the_levels():
    sigma = jnp.array([[1.0, 0.5, 0.05]])
    weights = {
        kind: np.asarray(make_task(dataclasses.replace(SETTINGS, weight=kind)).level_weight(sigma))
        for kind in ForcingConfig.CHOICES["weight"]
    }
    assert (weights["uniform"] == 1).all()
    assert weights["gaussian"][0, 0] == 0 < weights["gaussian"][0, 2] < weights["gaussian"][0, 1]
    np.testing.assert_allclose(weights["clean"][0], [1, 0.25, 0.01], rtol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("form", ["bidirectional", "block_causal"])
@pytest.mark.parametrize("network", [DiT, PortraitDiT])
def test_two_clips_are_learnt_by_heart(form, network):
    clips = make_clips(2, 6)
    settings = ForcingConfig(batch_size=2, latents=6, form=form, weight="clean", text_dropout=0.0)
    settings = dataclasses.replace(
        settings, shift=1.0, audio_dropout=0.0, smallest_sigma=network.smallest_sigma
    )
    task = make_task(settings, clips, network=network)
    loop = LoopConfig(num_steps=500, learning_rate=4e-3, warmup_steps=20)
    state = start_state(task.init(jax.random.key(0)), make_optimiser(loop))
    step, batch, measure = task.make_step(loop), task.batches(0), jax.jit(task.loss)

    def error(params):
        keys = jax.random.split(jax.random.key(5), 16)
        return np.mean([measure(params, batch, key)[0] for key in keys])

    before = error(state.params)
    for _ in range(loop.num_steps):
        state, _ = step(state, batch, jax.random.key(1))
    assert error(state.params) < before / 5


def test_every_window_comes_once_per_epoch_and_batches_repeat():
    clips = make_clips(6, 6)
    clips = dataclasses.replace(
        clips, lip_gap=np.broadcast_to(np.arange(6.0)[:, None], clips.lip_gap.shape)
    )
    task = make_task(SETTINGS, clips)
    seen = [task.batches(step)["lip_gap"][:, 0] for step in range(6)]
    assert sorted(np.concatenate(seen[:3])) == sorted(np.concatenate(seen[3:])) == list(range(6))
    for name, value in task.batches(4).items():
        np.testing.assert_array_equal(value, task.batches(4)[name])


def test_only_the_stillest_windows_of_every_person_are_kept():
    clips = make_clips(4)
    moved = clips.latent.copy()
    moved[1::2] += 1  # one of two clips of each person has moved away
    clips = dataclasses.replace(clips, latent=moved, person=np.array([7, 7, 9, 9]))
    task = make_task(dataclasses.replace(SETTINGS, still_share=0.5), clips)
    assert set(task.windows.windows[:, 0]) == {0, 2}
    assert len(task.windows.windows) == 2 * 4


def test_speech_and_picture_of_a_window_belong_together():
    clips = make_clips()
    task = make_task(SETTINGS, clips)
    starts = set()
    for step in range(12):
        batch = task.batches(step)
        opening = (batch["latent"] - batch["reference"])[:, :, 2, 1]
        np.testing.assert_allclose(opening.reshape(2, -1), batch["lip_gap"], atol=5e-3)
        starts.add(float(batch["lip_gap"][0, 0]))
    assert len(starts) > len(clips)  # windows start at different latents of a clip


def test_the_mouth_reader_finds_a_linear_mouth():
    clips = make_clips(8)
    reader = fit_mouth_reader(clips, ridge=1e-3)
    other = make_clips(8, seed=5)
    gap = reader(
        jnp.asarray(other.latent, jnp.float32),
        jnp.asarray(other.reference, jnp.float32),
        jnp.asarray(other.mouth, jnp.float32),
    )
    assert np.corrcoef(gap.ravel(), other.lip_gap.ravel())[0, 1] > 0.99


def test_mouth_cells_cover_the_boxes_of_all_four_frames():
    boxes = np.array([[17, 17, 23, 23]] * 3 + [[25, 17, 31, 23]] + [[9, 9, 15, 15]] * 4, float)
    cells = mouth_cells(boxes, (4, 4), 8, margin=0.0)
    expected = np.zeros((2, 4, 4), bool)
    expected[0, 2, 2:4] = True
    expected[1, 1, 1] = True
    np.testing.assert_array_equal(cells, expected)


def test_settings_that_do_not_fit_the_clips_are_named():
    with pytest.raises(ValueError, match=r"task\.latents=5: clips have 9 and a block has 3"):
        make_task(dataclasses.replace(SETTINGS, latents=5))
    with pytest.raises(ValueError, match=r"model\.audio_layers"):
        make_task(audio_layers=3)


def test_no_levels_are_drawn_at_which_the_network_cannot_meet_its_target():
    low = dataclasses.replace(SETTINGS, smallest_sigma=0.05)
    message = r"task\.smallest_sigma asks PortraitDiT for noise level 0\.05; .*from 0\.1 up"
    with pytest.raises(ValueError, match=message):
        make_task(low)
    assert make_task(low, network=DiT).settings.smallest_sigma == 0.05

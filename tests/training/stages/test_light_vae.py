"""Training of the light VAE: batches, weights, what is learned and what stays."""

import jax
import numpy as np
import optax
import pytest

from jax_avatar.models.vae.light import LightVAEConfig
from jax_avatar.training.stages.light_vae import (
    FaceWindows,
    VAELossConfig,
    VAETask,
    latent_statistics,
    mouth_weight,
    reconstruction_scores,
)
from jax_avatar.weights.files import load_weights

NANO = LightVAEConfig(
    z_dim=6, latent_width=8, frame_width=6, stem_width=4, latent_blocks=1, frame_blocks=1
)


@pytest.fixture(scope="module")
def windows():
    """Grey clips with a dark mouth that opens and closes, 32x32 pixels."""
    rng = np.random.default_rng(0)
    frames, boxes = [], []
    for _ in range(4):
        clip = np.full((13, 32, 32, 3), rng.integers(80, 200, 3), np.uint8)
        opening = rng.integers(2, 8, 13)
        for frame, gap in zip(clip, opening, strict=True):
            frame[18 : 18 + gap, 10:22] = 20
        frames.append(clip)
        boxes.append(np.stack([[10.0, 18.0, 22.0, 18.0 + gap] for gap in opening]))
    return FaceWindows(frames, [box.astype(np.float32) for box in boxes])


@pytest.fixture(scope="module")
def task(windows):
    return make_task(windows)


def make_task(windows, **settings):
    settings = {"frames": 5, "batch_size": 2, "crop": 16, **settings}
    return VAETask(NANO, VAELossConfig(**settings), windows, windows)


def test_batches_depend_on_the_step_alone(task):
    there_and_back = [3, 2, 1, 0]
    later = {step: task.batches(step) for step in there_and_back}
    for step in range(4):
        one, two = task.batches(step), later[step]
        for name in one:
            np.testing.assert_array_equal(one[name], two[name])
    assert not np.array_equal(task.batches(5)["video"], task.batches(6)["video"])


def test_weight_follows_the_mouth_through_crops_and_flips(task):
    shapes = set()
    for step in range(12):
        batch = task.batches(step)
        shapes.add(batch["video"].shape)
        dark = (batch["video"] == 20).all(-1)
        np.testing.assert_array_equal(batch["weight"][dark], 6.0)
    assert shapes == {(2, 5, 32, 32, 3), (8, 5, 16, 16, 3)}


def test_training_lowers_the_error_and_spares_a_frozen_encoder(windows):
    task = make_task(windows, crop=0, latent_noise=0.0, colour_jitter=0.0)
    params = task.init(jax.random.key(0))
    assert "encoder" not in params
    before = task.model_params(params)
    optimiser = optax.adamw(5e-3)

    @jax.jit
    def step(params, state, batch, key):
        (_, metrics), grads = jax.value_and_grad(task.loss, has_aux=True)(params, batch, key)
        updates, state = optimiser.update(grads, state, params)
        return optax.apply_updates(params, updates), state, metrics

    state, errors, batch = optimiser.init(params), [], task.batches(0)
    for i in range(30):
        params, state, metrics = step(params, state, batch, jax.random.key(i))
        errors.append(float(metrics["l1"]))
    assert errors[-1] < 0.9 * errors[0]
    after = task.model_params(params)
    jax.tree.map(np.testing.assert_array_equal, before["encoder"], after["encoder"])


def test_export_holds_what_was_evaluated(task, tmp_path):
    key = jax.random.key(0)
    params = task.init(key)
    task.export(params, tmp_path, {"step": 3})
    weights, config, metadata = load_weights(tmp_path, "vae")
    assert LightVAEConfig(**config) == NANO
    assert metadata["step"] == 3
    assert metadata["held_out_scores"]["psnr"] > 15
    assert set(weights) == {"encoder", "decoder"}
    again = make_task(task.train, start_from=str(tmp_path))
    jax.tree.map(np.testing.assert_array_equal, again.model_params(again.init(key)), weights)
    np.testing.assert_allclose(
        weights["encoder"]["patch"]["kernel"],
        task.model_params(params)["encoder"]["patch"]["kernel"],
        atol=1e-3,
    )


def test_statistics_make_channels_alike_as_far_as_asked():
    rng = np.random.default_rng(0)
    latent = rng.normal(size=(2, 3, 8, 8, 3)) * np.array([4.0, 1.0, 0.25]) + 2.0
    latent = latent.astype(np.float32)
    for whitening, ratio in ((0.0, 16.0), (0.5, 4.0), (1.0, 1.0)):
        mean, std = latent_statistics(latent, whitening=whitening)
        normal = (latent - np.array(mean)) / np.array(std)
        spread = normal.reshape(-1, 3).std(0)
        np.testing.assert_allclose(normal.reshape(-1, 3).mean(0), 0.0, atol=1e-5)
        np.testing.assert_allclose(np.mean(spread**2), 1.0, rtol=1e-5)
        np.testing.assert_allclose(spread[0] / spread[2], ratio, rtol=0.2)


def test_scores_tell_the_mouth_from_the_rest(windows):
    video = np.stack(windows.frames)
    box = np.stack(windows.mouth_box)
    inside = mouth_weight(box, 32, 32, 2.0, margin=0.0) > 1
    worse = np.where(inside[..., None], video, np.clip(video.astype(int) + 20, 0, 255))
    scores = reconstruction_scores(video, worse.astype(np.uint8), box)
    assert scores["psnr"] < 24
    assert scores["mouth_psnr"] > 60


def test_settings_are_checked(windows):
    with pytest.raises(ValueError, match="use 5, 9 or 13"):
        VAELossConfig(frames=8)
    with pytest.raises(ValueError, match="A clip has 13 frames"):
        make_task(windows, frames=17)

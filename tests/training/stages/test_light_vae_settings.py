"""The light VAE's loss and batches are those of its settings."""

import copy
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_avatar.training.stages import light_vae as vae
from jax_avatar.training.stages.light_vae import FaceWindows, VAELossConfig, VAETask
from tests.training.stages.test_light_vae import NANO

LOSS = VAELossConfig(
    mouth_weight=3.0, square_weight=5.0, gradient_weight=0.7, motion_weight=1.5,
    latent_weight=0.25, latent_noise=0.0, colour_jitter=0.0, frames=5, crop=16, batch_size=3,
)  # fmt: skip
KEY = jax.random.key(1)


class Network:
    """Latents are ones times 2; a video is grey whatever they are. Both are kept."""

    seen = {}

    def bind(self, params):
        return self

    def encode(self, video):
        self.seen["video"] = video
        b, t, h, w, _ = video.shape
        return jnp.full((b, (t + 3) // 4, h // 8, w // 8, 6), 2.0)

    def decode(self, latent):
        self.seen["latent"] = latent
        return jnp.zeros_like(self.seen["video"])


@pytest.fixture(scope="module")
def task():
    """On clips of one colour each, with a dark mouth that opens and closes."""
    clips = [np.full((9, 32, 32, 3), 70 + 15 * number, np.uint8) for number in range(9)]
    for clip in clips:
        for number, frame in enumerate(clip):
            frame[18 : 20 + number % 5, 10:22] = 20
    box = np.tile(np.float32([10, 18, 22, 24]), (9, 1))
    return VAETask(NANO, LOSS, FaceWindows(clips, [box] * len(clips)))


def with_settings(task, **changes):
    """The task with other settings; what it has fitted and compiled stays."""
    other = copy.copy(task)
    other.settings = dataclasses.replace(LOSS, **changes)
    return other


@pytest.fixture
def measured(task):
    """`(settings) -> loss, metrics, batch`; what the network was given is in `Network.seen`."""

    def measure(**changes):
        other = with_settings(task, **changes)
        other.model_params, other.network = (lambda params: params), Network()
        batch = other.batches(0)
        loss, metrics = other.loss({}, jax.tree.map(jnp.asarray, batch), KEY)
        return float(loss), metrics, batch

    return measure


def test_every_part_of_the_loss_has_its_weight(measured):
    loss, metrics, batch = measured()
    error, weight = batch["video"] / 127.5 - 1, batch["weight"][..., None]

    def mean(value, weight):
        return (value * weight).sum() / (weight.sum() * 3)

    parts = {
        "l1": mean(np.abs(error), weight),
        "gradient": mean(np.abs(np.diff(error, axis=2)), weight[:, :, 1:])
        + mean(np.abs(np.diff(error, axis=3)), weight[:, :, :, 1:]),
        "motion": mean(np.abs(np.diff(error, axis=1)), weight[:, 1:]),
        "latent_ms": 4.0,
    }
    for name, value in parts.items():
        np.testing.assert_allclose(metrics[name], value, rtol=1e-4)
    square = mean(error**2, weight)
    total = parts["l1"] + 5 * square + 0.7 * parts["gradient"] + 1.5 * parts["motion"] + 0.25 * 4
    np.testing.assert_allclose(loss, total, rtol=1e-4)
    assert set(np.unique(batch["weight"])) == {1, 3}


def test_noise_of_a_latent_is_at_most_as_told_and_of_its_own_strength(measured):
    measured(latent_noise=0.4, batch_size=40, crop=0)
    spread = (np.asarray(Network.seen["latent"]) - 2).std((2, 3, 4))
    assert 0.3 < spread.max() < 0.52 and spread.min() < 0.05
    assert spread.mean() == pytest.approx(0.2, abs=0.03)
    assert abs(np.corrcoef(spread.T)[0, 1]) < 0.5


def test_colours_are_changed_by_at_most_as_told_and_alike_in_a_clip(measured):
    _, _, batch = measured(colour_jitter=0.3, batch_size=40, crop=0)
    plain, seen = batch["video"] / 127.5 - 1, np.asarray(Network.seen["video"])
    change = np.abs(seen - plain).max((1, 2, 3, 4))
    # Brightness by 0.3, contrast by as much, each colour by half of that.
    assert 0.3 < change.max() < 0.3 + 0.3 + 0.3 * 1.3 and len(np.unique(change)) > 30
    grey = (plain == plain[:, :1, :1, :1]).all(-1)
    for clip, where in zip(seen, grey, strict=True):
        assert np.ptp(clip[where], axis=0).max() < 1e-5
    batch = measured()[2]
    np.testing.assert_allclose(Network.seen["video"], batch["video"] / 127.5 - 1, atol=1e-6)


@pytest.mark.parametrize(("crop", "share"), [(16, 0.25), (24, 1.0), (0, 1.0)])
def test_batches_are_as_large_and_as_often_cropped_as_told(crop, share, task):
    other = with_settings(task, crop=crop, crop_share=share)
    shapes = [other.batches(step)["video"].shape for step in range(60)]
    whole = (3, 5, 32, 32, 3)
    cropped = (3 * 32 * 32 // crop**2 if crop else 3, 5, crop, crop, 3)
    assert set(shapes) <= {whole, cropped}
    expected = share if crop else 0
    assert np.mean([shape != whole for shape in shapes]) == pytest.approx(expected, abs=0.15)


@pytest.mark.parametrize("train_encoder", [False, True])
def test_the_encoder_is_a_parameter_only_if_it_is_trained(train_encoder, task):
    params = with_settings(task, train_encoder=train_encoder).init(KEY)
    assert ("encoder" in params) == train_encoder


def test_the_basis_is_fitted_with_its_own_weight_of_the_mouth(task, monkeypatch):
    def components(video, weight, count):
        raise LookupError(*np.unique(weight))

    monkeypatch.setattr(vae, "principal_components", components)
    with pytest.raises(LookupError) as noted:
        with_settings(task, basis_mouth_weight=11.0).fit_basis()
    assert noted.value.args == (1, 11)


def test_batches_are_those_of_the_seed(task):
    def batch(seed):
        other = with_settings(task, crop=0)
        other.seed = seed
        return other.batches(0)["video"]

    np.testing.assert_array_equal(batch(1), batch(1))
    assert (batch(1) != batch(2)).any()

import numpy as np
import pytest

from jax_avatar.evaluation.mouth_probe import MouthProbe
from jax_avatar.evaluation.scores import Truth, score, score_stream


class BrightnessProbe(MouthProbe):
    """Stands in for the trained probe: the opening is the brightness of the picture."""

    def __init__(self):
        super().__init__({}, 0.0, 1.0)

    def predict(self, frames, boxes):
        return frames.astype(np.float32).mean((1, 2, 3))


def make_truth(count=5, frames=48):
    rng = np.random.default_rng(0)
    gap = np.cumsum(rng.standard_normal((count, frames)), axis=1).astype(np.float32)
    gap -= gap.mean(1, keepdims=True)
    portrait = rng.integers(60, 190, (count, 8, 8, 3)).astype(np.uint8)
    moving = portrait[:, None] + 3 * gap[..., None, None, None]
    video = np.clip(moving, 0, 255).astype(np.uint8)
    return Truth(video, portrait, np.zeros((count, 4)), gap, np.arange(count))


def test_the_truth_scores_perfectly_and_other_clips_do_not():
    truth = make_truth()
    found = score(truth.frames, truth, BrightnessProbe())
    assert found["lip_r"] > 0.99 and found["lip_lag_frames"] == 0
    assert found["lip_r_other"] < 0.6
    assert found["identity"] < 0.5
    assert found["motion"] == pytest.approx(1)


def test_a_late_picture_has_a_positive_lag():
    truth = make_truth()
    late = np.concatenate([truth.frames[:, :1]] * 3 + [truth.frames[:, :-3]], axis=1)
    found = score(late, truth, BrightnessProbe())
    assert found["lip_lag_frames"] == 3 and found["lip_r_best"] > found["lip_r"]


def test_strangers_and_frozen_pictures_are_noticed():
    truth = make_truth()
    assert score(np.roll(truth.frames, 1, axis=0), truth, BrightnessProbe())["identity"] > 0.9
    frozen = np.repeat(truth.portrait[:, None], 48, axis=1)
    found = score(frozen, truth, BrightnessProbe())
    assert found["motion"] == 0 and found["lip_r"] == 0 and found["lip_amplitude"] < 1e-3


def test_drift_of_a_stream_is_measured_in_grey_levels():
    still = np.full((2, 40, 8, 8, 3), 100, np.uint8)
    portrait = still[:, 0]
    assert score_stream(still + np.eye(8, dtype=np.uint8)[..., None], portrait, 10)[
        "colour_drift"
    ] == pytest.approx(0)
    drifting = still + np.linspace(0, 20, 40).astype(np.uint8)[None, :, None, None, None]
    found = score_stream(drifting + np.eye(8, dtype=np.uint8)[..., None], portrait, 1)
    assert found["colour_drift"] == pytest.approx(20)
    assert found["portrait_distance_last"] > found["portrait_distance_first"]


def test_a_stream_that_turns_into_another_person_loses_its_identity():
    portrait = make_truth(count=3).portrait
    same = np.repeat(portrait[:, None], 20, axis=1)
    swapped = np.concatenate([same[:, :10], np.roll(same, 1, axis=0)[:, 10:]], axis=1)
    found = score_stream(swapped, portrait, 5)
    assert found["identity_first"] == 0 and found["identity_last"] > 1

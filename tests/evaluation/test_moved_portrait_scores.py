"""Scores of a VAE that moves a portrait: what is right scores as right, what is wrong shows."""

import numpy as np
import pytest

pytest.importorskip("numba")

from jax_avatar.data.talking_people.head_motion import CURVES, LIDS, SCALE, index
from jax_avatar.data.talking_people.moved_portraits import MovedPortrait
from jax_avatar.evaluation.mouth_probe import MouthProbe
from jax_avatar.evaluation.moved_portrait_scores import blinks, clip_scores, means, resized

COUNT, SIDE = 12, 32


class Probe(MouthProbe):
    """Reads the brightness of the frames, of which the truth's lips are made."""

    def __init__(self):
        pass

    def predict(self, frames, boxes):
        assert frames.shape[1] == 96 and boxes.shape == (COUNT, 4)
        return frames.mean((1, 2, 3)).astype(np.float32)


@pytest.fixture(scope="module")
def truth():
    """Noise that moves to the right by one pixel a frame and changes its brightness."""
    rng = np.random.default_rng(0)
    picture = rng.integers(60, 160, (SIDE, SIDE, 3))
    level = rng.integers(-50, 50, COUNT)
    frames = np.stack([np.roll(picture, i, 1) + level[i] for i in range(COUNT)]).astype(np.uint8)
    motion = np.zeros((COUNT, 4, len(CURVES)), np.float32)
    lids = index(*LIDS)
    for i in range(COUNT):
        motion[i, i % 4, lids] = (i % 3) / 2 / SCALE[lids]
    box = np.float32([[0.3, 0.6, 0.7, 0.9], [0.5, 0.3, 0.7, 0.4], [0.2, 0.3, 0.4, 0.4]])
    grid = np.zeros((64, 64), np.float16)
    return MovedPortrait(
        portrait=picture.astype(np.uint8),
        portrait_surface=np.zeros((SIDE, SIDE), np.uint8),
        depth=grid,
        head_weight=grid,
        camera=np.zeros(4, np.float32),
        frames=frames,
        surface=np.zeros((COUNT, SIDE, SIDE), np.uint8),
        flow=np.zeros((COUNT, 64, 64, 2), np.float16),
        seen=np.zeros((COUNT, 64, 64), np.uint8),
        boxes=np.tile(box, (COUNT, 1, 1)),
        lip_gap=(level / 400).astype(np.float32),
        motion=motion,
        offset=(np.arange(COUNT) % 4).astype(np.int8),
        wave=np.zeros(0, np.float32),
    )


def test_the_truth_is_perfect(truth):
    scores = clip_scores(truth.frames, truth, Probe(), Probe())
    for name in ("sharp", "face_sharp", "motion", "jump", "lip_r"):
        assert scores[name] == pytest.approx(1, abs=1e-3)
    assert scores["psnr"] == scores["face_psnr"] == scores["closed_lid"] > 60
    assert scores["above_still"] > 30


def test_a_blurred_clip_is_soft_and_a_still_one_does_not_move(truth):
    blurred = resized(resized(truth.frames, SIDE // 2), SIDE)
    assert clip_scores(blurred, truth, Probe())["sharp"] < 0.7
    still = clip_scores(np.repeat(truth.portrait[None], COUNT, 0), truth, Probe())
    assert still["motion"] == 0 and still["above_still"] == 0 and "jump" not in still


def test_jumps_between_windows_show(truth):
    jumping = truth.frames.copy()
    jumping[4:8] = 0
    assert clip_scores(jumping, truth, Probe())["jump"] > 1.2


def test_errors_are_found_where_they_are(truth):
    wrong = truth.frames.copy()
    wrong[:, 10:13, 5:24] = 0  # the eyes
    scores = clip_scores(wrong, truth, Probe())
    assert scores["closed_lid"] < 20 < 60 < scores["wide_mouth"]
    assert scores["face_psnr"] < scores["psnr"]


def test_lids_are_those_of_the_frame_in_its_window(truth):
    np.testing.assert_allclose(blinks(truth), np.arange(COUNT) % 3 / 2, atol=1e-6)


def test_means_have_intervals_and_leave_out_what_a_clip_lacks():
    rows = [{"psnr": 30.0 + i} for i in range(9)] + [{"psnr": 34.0, "jump": 1.0}]
    found = means(rows)
    mean, low, high = found["psnr"]
    assert mean == pytest.approx(34.0) and 31 < low < mean < high < 37
    assert found["jump"] == (1.0, 1.0, 1.0)

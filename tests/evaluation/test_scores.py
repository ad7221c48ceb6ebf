import numpy as np
import pytest

from jax_avatar.evaluation.mouth_probe import MouthProbe
from jax_avatar.evaluation.scores import (
    Truth,
    interval,
    measure,
    score,
    score_stream,
    still_portraits,
    summarise,
)
from jax_avatar.evaluation.tables import COLUMNS, rows_of, scored


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
    assert found["interval"]["colour_drift"] == pytest.approx([20, 20])
    drifting[1] = still[1]
    found = score_stream(drifting + np.eye(8, dtype=np.uint8)[..., None], portrait, 1)
    assert found["interval"]["colour_drift"] == pytest.approx([0, 20])
    assert found["portrait_distance_last"] > found["portrait_distance_first"]


def test_a_stream_that_turns_into_another_person_loses_its_identity():
    portrait = make_truth(count=3).portrait
    same = np.repeat(portrait[:, None], 20, axis=1)
    swapped = np.concatenate([same[:, :10], np.roll(same, 1, axis=0)[:, 10:]], axis=1)
    found = score_stream(swapped, portrait, 5)
    assert found["identity_first"] == 0 and found["identity_last"] > 1


def test_the_still_portrait_is_what_others_are_above():
    truth = make_truth()
    still = score(still_portraits(truth), truth, BrightnessProbe())
    assert still["psnr_above_still"] == 0 and still["motion"] == 0
    noise = np.random.default_rng(1).integers(-8, 9, truth.frames.shape)
    near = np.clip(truth.frames + noise, 0, 255).astype(np.uint8)
    better = score(near, truth, BrightnessProbe())
    assert better["psnr_above_still"] == pytest.approx(better["psnr"] - still["psnr"])
    # Uniform noise from -8 to 8 has a variance of 24.
    assert better["psnr"] == pytest.approx(10 * np.log10(255**2 / 24), abs=0.1)


def test_lips_and_strangers_that_nobody_knows_stay_out():
    truth = make_truth(count=1)
    assert "identity" not in score(truth.frames, truth, None)
    assert not any("lip" in name for name in score(truth.frames, truth, None))
    assert "lip_r" in score(truth.frames, truth, BrightnessProbe())


def test_the_interval_of_a_mean_is_that_of_its_normal_distribution():
    values = np.random.default_rng(3).normal(5, 2, 100)
    ends = interval(lambda index: {"mean": values[index].mean()}, 100, draws=4000)["mean"]
    spread = 1.96 * values.std() / 10
    assert ends == pytest.approx([values.mean() - spread, values.mean() + spread], abs=0.06)
    half = interval(lambda index: {"mean": values[index].mean()}, 100, level=0.5)["mean"]
    assert half[1] - half[0] == pytest.approx(2 * 0.674 * values.std() / 10, abs=0.05)
    again = [interval(lambda index: {"n": values[index].sum()}, 100, seed=s) for s in (0, 0, 1)]
    assert again[0] == again[1] != again[2]


def test_a_table_has_every_row_with_intervals_over_its_clips():
    truth, probe = make_truth(), BrightnessProbe()
    late = np.concatenate([truth.frames[:, :1], truth.frames[:, :-1]], axis=1)
    found = measure(late, truth, probe)
    row = scored(found, seed=2)
    assert set(row["interval"]) == set(summarise(found)) == set(row) - {"interval"}
    low, high = row["interval"]["lip_r"]
    assert low < row["lip_r"] < high
    # Of clips that are all alike, every draw has the same score.
    same = scored(found.take(np.zeros(5, int)))
    assert same["interval"]["psnr"] == pytest.approx([same["psnr"]] * 2)
    lines = rows_of({"late": row, "no lips": scored(measure(late, truth, None))})
    assert len(lines) == 4 and all(line.count("|") == len(COLUMNS) + 2 for line in lines)
    assert f"{row['lip_r']:.2f} ({low:.2f}..{high:.2f})" in lines[2] and "n/a" in lines[3]

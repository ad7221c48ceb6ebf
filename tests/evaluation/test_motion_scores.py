import numpy as np
import pytest

from jax_avatar.data.talking_people.head_motion import CURVES, LIDS, SCALE, index
from jax_avatar.evaluation.motion_scores import (
    frechet,
    groups_of,
    motion_rows,
    motion_scores,
)
from jax_avatar.models.vae.anchored import AnchoredVAEConfig

FPS, FRAMES = 25, 240
CONFIG = AnchoredVAEConfig(CURVES, tuple(SCALE.tolist()))


def smooth(rng, *shape):
    """Noise without fast parts along the second axis from the end."""
    noise, kernel = rng.normal(size=shape), np.hanning(13)
    return np.apply_along_axis(np.convolve, -2, noise, kernel / kernel.sum(), "same")


@pytest.fixture(scope="module")
def truth():
    rng = np.random.default_rng(0)
    curves = 3 * smooth(rng, 10, FRAMES, len(CURVES))
    curves[..., index(*LIDS)] = 0
    for middle in (40, 120, 200):  # three blinks in 9.6 s
        curves[:, middle : middle + 4, index(*LIDS)] = 1 / SCALE[index(*LIDS)]
    return curves


def scores(made, truth):
    return motion_scores(made, truth, CONFIG, FPS)


def test_the_truth_has_perfect_scores(truth):
    found = scores(np.stack([truth, truth]), truth)
    assert found["lip_r"] == pytest.approx(1) and found["lip_lag_frames"] == 0
    assert abs(found["lip_r_other"]) < 0.2
    assert found["blinks"] == found["blinks_true"] == pytest.approx(3 / 9.6 * 60)
    for group in groups_of(CONFIG):
        for name in ("energy", "speed", "jump"):
            assert found[f"{name}_{group}"] == pytest.approx(1), (name, group)
        assert found[f"seeds_{group}"] == pytest.approx(0, abs=1e-9)
        assert found[f"distance_{group}"] == pytest.approx(0, abs=1e-3)
    low, high = found["interval"]["lip_r"]
    assert low <= found["lip_r"] + 1e-9 and high >= found["lip_r"] - 1e-9
    assert len(motion_rows({"truth": found})) == 3


def test_every_defect_moves_its_score(truth):
    rng = np.random.default_rng(1)
    late = scores(np.roll(truth, 2, axis=1)[None], truth)
    assert late["lip_lag_frames"] == 2 and late["lip_r"] < 0.95
    frozen = scores(0 * truth[None], truth)
    assert frozen["blinks"] == 0 and frozen["speed_head"] == 0 and frozen["lip_r"] == 0
    assert frozen["distance_head"] > 0.8
    nervous = scores(truth[None] + 0.3 * rng.normal(size=truth.shape), truth)
    assert nervous["speed_head"] > 1.5 and nervous["energy_head"] < 1.5
    steps = np.repeat(truth[:, ::4], 4, axis=1)
    assert scores(steps[None], truth)["jump_gaze"] > 2
    small = truth.copy()
    small[..., index("jawOpen")] *= 0.5
    assert scores(small[None], truth)["lip_amplitude"] == pytest.approx(0.5, rel=1e-6)
    seeds = np.stack([smooth(rng, *truth.shape) * 3 for _ in range(4)])
    drawn = scores(seeds, truth)
    assert 0.8 < drawn["seeds_head"] < 1.2 and "seeds_head" not in frozen
    assert abs(drawn["lip_r"]) < 0.2


def test_the_frechet_distance_sees_means_and_spreads(truth):
    part = truth[..., :4]
    same = frechet(part, part, 50)
    assert same == pytest.approx(0, abs=1e-3)
    assert frechet(part + 1, part, 50) > 10 * same + 0.1
    assert frechet(2 * part, part, 50) > 0.3

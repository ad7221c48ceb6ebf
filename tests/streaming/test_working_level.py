from pathlib import Path

import numpy as np
import pytest

from jax_avatar.io.audio import load_audio
from jax_avatar.streaming.working_level import WorkingLevel

RATE = 16_000
SPEECH = load_audio(Path(__file__).parents[2] / "jax_avatar" / "assets" / "demo.flac")


def db(gain):
    return np.float32(10 ** (gain / 20))


def loudest_db(samples):
    steps = samples[: len(samples) // 320 * 320].reshape(-1, 320).astype(np.float64)
    return 10 * np.log10(np.percentile((steps**2).mean(1), 98))


def noise(level, seconds, seed=0):
    samples = np.random.default_rng(seed).normal(size=round(seconds * RATE))
    return (db(level) * samples).astype(np.float32)


@pytest.mark.parametrize("gain", [6, 0, -6])
def test_speech_of_a_usual_level_passes_bit_by_bit(gain):
    speech = np.clip(db(gain) * SPEECH, -1, 1)
    assert WorkingLevel(RATE)(speech) is speech


@pytest.mark.parametrize("gain", [-25, -35, -45])
def test_quiet_speech_is_brought_to_the_level_of_training(gain):
    heard = WorkingLevel(RATE)(db(gain) * SPEECH)
    assert -36 < loudest_db(heard[2 * RATE :]) < -28 and np.abs(heard).max() < 0.5
    # Only the gain differs, and that moves slowly.
    assert np.corrcoef(heard[2 * RATE :], SPEECH[2 * RATE :])[0, 1] > 0.95


def test_pieces_of_any_size_are_the_whole():
    quiet = db(-40) * SPEECH[: 3 * RATE]
    whole = WorkingLevel(RATE)(quiet)
    for size in (1, 77, 320, 5000):
        level = WorkingLevel(RATE)
        count = 4000 if size == 1 else len(quiet)
        parts = [level(quiet[i : i + size]) for i in range(0, count, size)]
        np.testing.assert_allclose(np.concatenate(parts)[:count], whole[:count], rtol=1e-5)
    assert len(WorkingLevel(RATE)(quiet[:0])) == 0


def test_rooms_and_silence_are_not_taken_for_quiet_speech():
    level = WorkingLevel(RATE)
    sounds = (
        np.zeros(RATE, np.float32),
        noise(-60, 5.0),  # before anybody speaks
        SPEECH + noise(-60, len(SPEECH) / RATE, 1),
        noise(-60, 60.0, 2),  # a long pause
        np.zeros(RATE, np.float32),
        SPEECH,
    )
    for sound in sounds:
        np.testing.assert_array_equal(level(sound), sound)


def test_one_loud_knock_is_forgotten():
    level = WorkingLevel(RATE)
    level(db(-40) * SPEECH)
    before = level.gain
    level(noise(-6, 0.02))
    assert level.gain == 1
    for _ in range(10):
        level(db(-40) * SPEECH)
    assert 2 < level.gain < before

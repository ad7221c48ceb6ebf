import json
import shutil
from importlib import resources

import numpy as np
import pytest

from jax_avatar.data.talking_people import sentences, speech
from jax_avatar.data.talking_people.speech import Phone, Utterance

needs_flite = pytest.mark.skipif(shutil.which("flite") is None, reason="needs the program flite")
BAMA = [
    ("pau", 0.0, 0.2),
    ("b", 0.2, 0.26),
    ("AA1", 0.26, 0.5),
    ("m", 0.5, 0.56),
    ("aa", 0.56, 0.8),
]


def _tone_then_silence():
    """A vowel as a tone, with silence around it."""
    times = np.arange(16000) / 16000
    wave = np.where((times > 0.3) & (times < 0.7), np.sin(2 * np.pi * 440 * times), 0) * 0.5
    phones = (Phone("pau", 0.0, 0.3), Phone("aa", 0.3, 0.7), Phone("pau", 0.7, 1.0))
    return Utterance(wave.astype(np.float32), phones, "a", "slt")


def _is_contiguous(utterance):
    ends = [phone.end_s for phone in utterance.phones]
    starts = [phone.start_s for phone in utterance.phones]
    return starts == pytest.approx([0.0, *ends[:-1]]) and ends[-1] == pytest.approx(
        utterance.duration_s, abs=1e-3
    )


@pytest.mark.parametrize("shift", np.linspace(0, 1 / 16, 5))
def test_lips_meet_whatever_the_frame_grid(shift):
    phones = [(name, start + shift, end + shift) for name, start, end in BAMA]
    units = speech.mouth_units(phones, 1.0, 16)
    for name, start, end in phones:
        if speech.is_lip_closure(name):
            frame = np.argmin(np.abs(np.arange(16) / 16 - (start + end) / 2))
            assert units["jawOpen"][frame] < 0.05
            assert units["mouthPressLeft"][frame] > 0.4
        elif name == "AA1":
            frame = round((start + end) / 2 * 16)
            assert units["jawOpen"][frame] > 0.6


def test_rounding_starts_before_its_sound():
    phones = [("pau", 0.0, 0.2), ("k", 0.2, 0.4), ("uw", 0.4, 0.7), ("pau", 0.7, 1.0)]
    pucker = speech.mouth_units(phones, 1.0, 100)["mouthPucker"]
    assert 0.1 < pucker[36] < pucker[45]
    assert pucker[10] == 0


def test_units_are_float32_curves_on_both_sides():
    units = speech.mouth_units(BAMA, 0.8, 25, np.random.default_rng(0), amplitude=1.5)
    assert set(units) == set(speech.MOUTH_UNITS)
    for curve in units.values():
        assert curve.shape == (20,) and curve.dtype == np.float32
        assert curve.min() >= 0 and curve.max() <= 1
    np.testing.assert_array_equal(units["mouthPressLeft"], units["mouthPressRight"])
    repeated = speech.mouth_units(BAMA, 0.8, 25, np.random.default_rng(0), amplitude=1.5)
    np.testing.assert_array_equal(units["jawOpen"], repeated["jawOpen"])
    plain = speech.mouth_units(BAMA, 0.8, 25, amplitude=1.5)
    assert np.any(units["jawOpen"] != plain["jawOpen"])


@pytest.mark.slow
def test_augmentation_moves_phones_with_the_sound():
    for seed in range(4):
        changed = speech.augment(
            _tone_then_silence(), np.random.default_rng(seed), noise_db_range=(-90.0, -80.0)
        )
        assert changed.wave.dtype == np.float32
        assert 1 / 1.2 <= changed.duration_s <= 1 / 0.85
        assert _is_contiguous(changed)
        loud = np.flatnonzero(np.abs(changed.wave) > 0.2 * np.abs(changed.wave).max()) / 16000
        assert loud[0] == pytest.approx(changed.phones[1].start_s, abs=0.005)
        assert loud[-1] == pytest.approx(changed.phones[1].end_s, abs=0.005)


def test_crop_keeps_sound_and_phones_together():
    utterance = _tone_then_silence()
    early = speech.crop(utterance, -0.25, 0.75)
    assert [p.name for p in early.phones] == ["pau", "pau", "aa"]
    assert early.phones[2] == pytest.approx(("aa", 0.55, 0.75))
    np.testing.assert_array_equal(early.wave[4000:], utterance.wave[:8000])
    late = speech.crop(utterance, 0.5, 1.0)
    np.testing.assert_array_equal(late.wave[:8000], utterance.wave[8000:])
    assert not late.wave[8000:].any()
    assert _is_contiguous(early) and _is_contiguous(late)


def test_sentences_are_varied_and_seeded():
    lines = sentences.sentences(300, seed=3)
    assert lines == sentences.sentences(300, seed=3)
    assert lines != sentences.sentences(300, seed=4)
    assert len(set(lines)) == 300
    assert all("{" not in line and line[0].isupper() for line in lines)
    assert len({word.strip(".,?!;").lower() for line in lines for word in line.split()}) > 300


@needs_flite
def test_pitch_and_speed_are_independent():
    text = "A warm breeze blew."
    plain = speech.synthesise(text, "kal16")
    assert _is_contiguous(plain)
    np.testing.assert_array_equal(plain.wave, speech.synthesise(text, "kal16").wave)
    higher = speech.synthesise(text, "kal16", pitch=1.2)
    faster = speech.synthesise(text, "kal16", speed=1.25)
    assert higher.duration_s == pytest.approx(plain.duration_s, rel=0.02)
    assert faster.duration_s == pytest.approx(plain.duration_s / 1.25, rel=0.02)
    assert [p.name for p in plain.phones] == [p.name for p in faster.phones]
    assert [p.start_s for p in higher.phones] == pytest.approx(
        [p.start_s for p in plain.phones], abs=0.02
    )

    def centroid(wave):
        spectrum = np.abs(np.fft.rfft(wave))
        return (spectrum * np.linspace(0, 8000, len(spectrum))).sum() / spectrum.sum()

    assert centroid(higher.wave) > 1.08 * centroid(plain.wave)


@needs_flite
def test_the_held_out_voice_is_never_spoken_by_default():
    voices = {speech.speak(np.random.default_rng(seed)).voice for seed in range(5)}
    assert voices <= set(speech.TRAINING_VOICES)
    assert speech.HELD_OUT_VOICE not in speech.TRAINING_VOICES


def test_missing_flite_is_named(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(ValueError, match="install the package `flite`"):
        speech.synthesise("Hello.", "slt")
    with pytest.raises(ValueError, match="expected one of"):
        speech.synthesise("Hello.", "nobody")


def test_demo_phones_follow_the_demo_sound():
    import librosa

    assets = resources.files("jax_avatar") / "assets"
    wave, rate = librosa.load(str(assets / "demo.flac"), sr=None)
    aligned = json.loads((assets / "demo_phones.json").read_text())
    assert rate == 16000 and 7 < len(wave) / rate < 7.2
    level = {True: [], False: []}
    for name, start, end in aligned["phones"]:
        is_vowel = name[0] in "aeiou"
        if is_vowel or name == "sil":
            level[is_vowel].append(np.std(wave[int(start * rate) : int(end * rate)]))
    assert min(level[True]) > np.median(level[False])

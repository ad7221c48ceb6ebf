"""Text -> speech with phone times -> curves of mouth units, all from a seed.

    sentences -> synthesise (flite) -> augment -> Utterance -+-> wave
                                                             +-> phones -> mouth_units

Flite says when each phone ends, so the lips of a synthetic person are known exactly; whatever
`augment` does to the time axis of the wave it does to the phones.
"""

import dataclasses
import shutil
import subprocess
import tempfile
import wave as wave_file
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import librosa
import numpy as np
import scipy.fft
from jaxtyping import Float

from jax_avatar.data.talking_people.sentences import sentence

SAMPLE_RATE = 16_000
TRAINING_VOICES = ("slt", "rms", "awb")
HELD_OUT_VOICE = "kal16"
"""Never used in training. A diphone voice, so less alike the other three than they are."""
VOICES = (*TRAINING_VOICES, HELD_OUT_VOICE)


class Phone(NamedTuple):
    """One phone of an utterance: ARPAbet name in lower case, start and end in seconds."""

    name: str
    start_s: float
    end_s: float


@dataclasses.dataclass(frozen=True)
class Utterance:
    """Speech with its phones.

    Attributes:
        wave: mono samples at 16 kHz, [-1, 1], float32.
        phones: what is said when; contiguous, from 0 s to the end of the wave.
        text: what is said.
        voice: who says it.
        word_ends: in seconds, where the synthesiser tells them.
    """

    wave: np.ndarray  # samples
    phones: tuple[Phone, ...]
    text: str
    voice: str
    word_ends: tuple[float, ...] = ()

    @property
    def duration_s(self) -> float:
        """Length of the wave in seconds."""
        return len(self.wave) / SAMPLE_RATE


def synthesise(text: str, voice: str, *, pitch: float = 1.0, speed: float = 1.0) -> Utterance:
    """Speaks `text` with Flite.

    Pitch and formants move by resampling; Flite's own durations make up for the change in length,
    so that pitch and speed are independent.

    Args:
        text: an English sentence.
        voice: one of `VOICES`.
        pitch: factor on all frequencies, 0.5 to 2.
        speed: factor on the rate of speech, 0.5 to 2.

    Returns:
        The clean utterance; equal arguments give equal samples.

    Raises:
        ValueError: if an argument is out of range or the program `flite` is not installed.
    """
    if voice not in VOICES:
        raise ValueError(f"voice {voice!r}: expected one of {', '.join(VOICES)}.")
    if not (0.5 <= pitch <= 2 and 0.5 <= speed <= 2):
        raise ValueError(f"pitch {pitch}, speed {speed}: expected factors from 0.5 to 2.")
    program = shutil.which("flite")
    if program is None:
        raise ValueError(
            "Speech synthesis needs the program `flite`, which is not on the PATH: install the "
            "package `flite` (Debian, Ubuntu: `apt-get install flite`)."
        )
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "speech.wav"
        command = [
            program,
            "-voice",
            voice,
            "-psdur",
            "--setf",
            f"duration_stretch={pitch / speed}",
        ]
        done = subprocess.run(
            [*command, "-t", text, "-o", str(path)], capture_output=True, text=True, check=True
        )
        with wave_file.open(str(path)) as file:
            source_rate = file.getframerate()
            samples = np.frombuffer(file.readframes(file.getnframes()), np.int16)
    phones = []
    start = 0.0
    for token in (done.stdout + done.stderr).split():
        name, end = token.rsplit(":", 1)
        phones.append(Phone(name, start, float(end)))
        start = float(end)
    if not phones:
        raise ValueError(f"text {text!r}: Flite found nothing to say; pass words.")
    utterance = Utterance(samples.astype(np.float32) / 32768, tuple(phones), text, voice)
    return resampled(utterance, source_rate, pitch)


def augment(
    utterance: Utterance,
    rng: np.random.Generator,
    *,
    rate_range: tuple[float, float] = (0.85, 1.2),
    eq_sd_db: float = 5.0,
    gain_range: tuple[float, float] = (0.15, 0.9),
    noise_db_range: tuple[float, float] = (-90.0, -40.0),
) -> Utterance:
    """Another speaker, microphone and room noise for the same words.

    Args:
        utterance: what to change.
        rng: source of the changes.
        rate_range: factor on speed and pitch together, by resampling; phones follow.
        eq_sd_db: standard deviation of a random smooth equaliser curve.
        gain_range: peak of the result.
        noise_db_range: level of white noise relative to full scale.

    Returns:
        The changed utterance.
    """
    utterance = resampled(utterance, SAMPLE_RATE, rng.uniform(*rate_range))
    samples = utterance.wave
    size = scipy.fft.next_fast_len(len(samples), real=True)
    spectrum = scipy.fft.rfft(samples, size)
    bend_db = np.interp(
        np.linspace(0, 1, len(spectrum)), np.linspace(0, 1, 8), rng.normal(0, eq_sd_db, 8)
    )
    spectrum *= (10 ** (bend_db / 20)).astype(np.float32)
    samples = scipy.fft.irfft(spectrum, size)[: len(samples)]
    samples = samples / (np.abs(samples).max() + 1e-6) * np.float32(rng.uniform(*gain_range))
    noise = rng.standard_normal(len(samples), np.float32)
    samples = samples + noise * np.float32(10 ** (rng.uniform(*noise_db_range) / 20))
    return dataclasses.replace(utterance, wave=np.clip(samples, -1, 1).astype(np.float32))


def crop(utterance: Utterance, start_s: float, duration_s: float) -> Utterance:
    """Part of an utterance; silence where it reaches past either end."""
    first, count = round(start_s * SAMPLE_RATE), round(duration_s * SAMPLE_RATE)
    start_s, duration_s = first / SAMPLE_RATE, count / SAMPLE_RATE
    inside = utterance.wave[max(0, first) : max(0, first + count)]
    samples = np.zeros(count, np.float32)
    samples[max(0, -first) :][: len(inside)] = inside
    phones = [("pau", start_s, 0.0), *utterance.phones]
    phones.append(("pau", utterance.duration_s, start_s + duration_s))
    moved = [
        Phone(name, max(0.0, start - start_s), min(duration_s, end - start_s))
        for name, start, end in phones
    ]
    kept = tuple(phone for phone in moved if phone.start_s < phone.end_s)
    words = [end - start_s for end in utterance.word_ends]
    words = tuple(end for end in words if 0 < end < duration_s)
    return dataclasses.replace(utterance, wave=samples, phones=kept, word_ends=words)


def speak(rng: np.random.Generator, *, voices: Sequence[str] = TRAINING_VOICES) -> Utterance:
    """A random sentence in a random voice at a random pitch and speed, augmented."""
    text = sentence(rng)
    voice = str(rng.choice(voices))
    pitch, speed = rng.uniform(0.92, 1.08), rng.uniform(0.88, 1.15)
    return augment(synthesise(text, voice, pitch=pitch, speed=speed), rng)


def resampled(utterance: Utterance, source_rate: int, factor: float = 1.0) -> Utterance:
    """To 16 kHz, `factor` times as fast and as high.

    Args:
        utterance: whose wave has another rate.
        source_rate: that rate in Hz.
        factor: on speed and pitch together.
    """
    played_rate = round(source_rate * factor)
    samples = utterance.wave
    if played_rate != SAMPLE_RATE:
        samples = librosa.resample(samples, orig_sr=played_rate, target_sr=SAMPLE_RATE)
    stretch = source_rate / played_rate
    phones = [Phone(p.name, p.start_s * stretch, p.end_s * stretch) for p in utterance.phones]
    # Flite rounds its times to milliseconds and may end a frame after its last phone.
    phones[-1] = phones[-1]._replace(end_s=len(samples) / SAMPLE_RATE)
    words = tuple(end * stretch for end in utterance.word_ends)
    return dataclasses.replace(
        utterance, wave=samples.astype(np.float32), phones=tuple(phones), word_ends=words
    )


# ---------------------------------------------------------------- phones -> mouth units

# Weights of face units per viseme; names without a side stand for left and right.
_VISEMES = {
    "silence": {},
    "aa": dict(jawOpen=0.9, mouthLowerDown=0.28, mouthUpperUp=0.15),
    "ao": dict(jawOpen=0.72, mouthFunnel=0.5),
    "ow": dict(jawOpen=0.46, mouthFunnel=0.38, mouthPucker=0.42),
    "uw": dict(jawOpen=0.14, mouthFunnel=0.25, mouthPucker=0.8),
    "w": dict(jawOpen=0.08, mouthPucker=0.85),
    "er": dict(jawOpen=0.22, mouthFunnel=0.32, mouthPucker=0.16),
    "ae": dict(jawOpen=0.75, mouthStretch=0.32, mouthLowerDown=0.28, mouthSmile=0.15),
    "eh": dict(jawOpen=0.55, mouthStretch=0.26, mouthLowerDown=0.22),
    "ah": dict(jawOpen=0.52, mouthLowerDown=0.16),
    "ih": dict(jawOpen=0.28, mouthStretch=0.26, mouthSmile=0.15, mouthLowerDown=0.16),
    "iy": dict(jawOpen=0.15, mouthStretch=0.42, mouthSmile=0.3, mouthLowerDown=0.22),
    "y": dict(jawOpen=0.12, mouthStretch=0.35),
    "m": dict(mouthPress=0.5, mouthRollLower=0.35, mouthRollUpper=0.25),
    "f": dict(jawOpen=0.05, mouthRollLower=0.6, mouthUpperUp=0.3),
    "th": dict(jawOpen=0.16, tongueOut=0.25, mouthLowerDown=0.16),
    "t": dict(jawOpen=0.1, mouthStretch=0.1, mouthLowerDown=0.2),
    "s": dict(jawOpen=0.05, mouthStretch=0.3, mouthLowerDown=0.3, mouthUpperUp=0.15),
    "ch": dict(jawOpen=0.1, mouthFunnel=0.58, mouthPucker=0.2),
    "k": dict(jawOpen=0.2, mouthLowerDown=0.1),
    "l": dict(jawOpen=0.28, mouthLowerDown=0.16),
    "r": dict(jawOpen=0.14, mouthFunnel=0.36, mouthPucker=0.26),
    "hh": dict(jawOpen=0.26),
}
# Phones that look like another; diphthongs glide from one viseme to the next.
_LOOKS_LIKE = (
    {name: name for name in _VISEMES}
    | dict(pau="silence", sil="silence", ssil="silence", h="silence")
    | dict(b="m", p="m", v="f", dh="th", d="t", n="t", dx="t", z="s", jh="ch", sh="ch", zh="ch")
    | dict(g="k", ng="k", uh="uw", axr="er", ax="ah", ix="ih", en="t", em="m", el="l")
)
_GLIDES = dict(ay=("aa", "ih"), aw=("aa", "uw"), oy=("ow", "ih"), ey=("eh", "iy"))
_SIDED = ("mouthLowerDown", "mouthUpperUp", "mouthStretch", "mouthSmile", "mouthPress")
_ROUNDING = ("mouthPucker", "mouthFunnel")


def _sides(name: str) -> tuple[str, ...]:
    return (f"{name}Left", f"{name}Right") if name in _SIDED else (name,)


_SHAPES = sorted({unit for viseme in _VISEMES.values() for unit in viseme})
MOUTH_UNITS = tuple(side for unit in _SHAPES for side in _sides(unit))
"""Names of the face units that `mouth_units` drives."""

_GRID_HZ = 200


def mouth_units(
    phones: Iterable[tuple[str, int | float, int | float]],
    duration_s: int | float,
    fps: int | float,
    rng: np.random.Generator | None = None,
    *,
    amplitude: float | Float[np.ndarray, " p"] = 1.0,
) -> dict[str, Float[np.ndarray, " T"]]:
    """Curves of the face units that speech moves, at the times `i / fps`.

    Visemes are held for a phone and smoothed with a short lead (lips move before the sound);
    rounding spreads further than opening. Closures are put back after smoothing: the lips
    really meet for m, b, p, and the lower lip meets the teeth for f, v, however short they are.

    Args:
        phones: name, start and end in seconds; ARPAbet in either case, with or without stress.
        duration_s: length of the curves.
        fps: video frames per second.
        rng: varies the size of single phones by some 8 %; None for none.
        amplitude: factor on opening and rounding, for a lively or a mumbling speaker; one for all
            phones or one for each.

    Returns:
        A float32 curve of `round(duration_s * fps)` values in [0, 1] for each of `MOUTH_UNITS`.
    """
    phones = [(_bare(name), start, end) for name, start, end in phones]
    index = {name: i for i, name in enumerate(_SHAPES)}
    length = int(np.ceil(duration_s * _GRID_HZ)) + 2
    times = np.arange(length) / _GRID_HZ

    held = np.zeros((length, len(_SHAPES)))
    sizes = np.broadcast_to(amplitude, len(phones))
    for (name, start, end), amplitude in zip(phones, sizes, strict=True):
        size = amplitude * (1.0 if rng is None else np.clip(rng.normal(1, 0.08), 0.8, 1.2))
        first, last = round(start * _GRID_HZ), round(end * _GRID_HZ)
        visemes = _GLIDES.get(name) or (_LOOKS_LIKE.get(name, "ah"),)
        bounds = np.linspace(first, max(last, first + 1), len(visemes) + 1).round().astype(int)
        for viseme, begin, stop in zip(visemes, bounds[:-1], bounds[1:], strict=True):
            for unit, weight in _VISEMES[viseme].items():
                held[begin:stop, index[unit]] = weight * size
    curves = np.empty_like(held)
    for unit, i in index.items():
        sigma_s, lead_s = (0.055, 0.03) if unit in _ROUNDING else (0.032, 0.02)
        curves[:, i] = _smooth(held[:, i], sigma_s * _GRID_HZ, round(lead_s * _GRID_HZ))

    curves = _close_lips(curves, times, phones, index)
    frames = np.arange(round(duration_s * fps)) / fps
    return {
        side: np.clip(np.interp(frames, times, curves[:, i]), 0, 1).astype(np.float32)
        for unit, i in index.items()
        for side in _sides(unit)
    }


def _close_lips(curves, times, phones, index):
    """Puts closures back that smoothing has opened: m, b, p and f, v."""
    for name, start, end in phones:
        viseme = _LOOKS_LIKE.get(name)
        if viseme not in ("m", "f"):
            continue
        target = np.zeros(len(_SHAPES))
        for unit, weight in _VISEMES[viseme].items():
            target[index[unit]] = weight
        # Flat for at least one frame of 16 fps video, so that no frame rate misses a closure.
        half = max(end - start, 0.0625) / 2
        outside = np.abs(times - (start + end) / 2 + 0.01) - half
        closed = 0.5 + 0.5 * np.cos(np.pi * np.clip(outside / 0.04, 0, 1))
        curves += closed[:, None] * (target - curves)
    return curves


def is_lip_closure(name: str) -> bool:
    """True if the lips close in this phone: m, b, p."""
    return _LOOKS_LIKE.get(_bare(name)) == "m"


def is_vowel(name: str) -> bool:
    """True for vowels, diphthongs among them."""
    return _bare(name)[0] in "aeiou" and _bare(name) not in ("el", "em", "en")


def is_silence(name: str) -> bool:
    """True for a pause."""
    return _LOOKS_LIKE.get(_bare(name)) == "silence"


def _bare(name: str) -> str:
    return name.lower().rstrip("012")


def _smooth(curve: np.ndarray, sigma: float, lead: int) -> np.ndarray:
    reach = int(3 * sigma)
    kernel = np.exp(-0.5 * (np.arange(-reach, reach + 1) / sigma) ** 2)
    padded = np.concatenate([np.full(reach, curve[0]), curve, np.full(reach + lead, curve[-1])])
    return np.convolve(padded[lead:], kernel / kernel.sum(), "valid")

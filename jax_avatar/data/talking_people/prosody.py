"""Prosody that the motion of a speaker follows: syllables, stress, phrases, loudness.

wave, phones -> vowels: energy, length, pitch -> stress
             -> pauses -> phrases
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from jax_avatar.data.talking_people import speech
from jax_avatar.data.talking_people.speech import SAMPLE_RATE, Utterance

__all__ = ["Prosody", "listen", "phone_sizes"]

_PAUSE_S = 0.15
_PITCH_HZ = (70, 380)
_NEIGHBOUR_S = 0.45


@dataclasses.dataclass(frozen=True, eq=False)
class Prosody:
    """Times in seconds from the start of the wave."""

    vowels: np.ndarray  # [n 2] start and end
    stress: np.ndarray  # [n] 0 to 1, 0 for most
    level: np.ndarray  # [n] loudness against the median vowel in dB
    phrases: np.ndarray  # [m 2] start and end of what is said without a pause
    questions: np.ndarray  # [m] 1 where a question ends
    word_ends: np.ndarray  # [w]

    def later(self, seconds: float) -> "Prosody":
        """The same at later times."""
        moved = {n: getattr(self, n) + seconds for n in ("vowels", "phrases", "word_ends")}
        return dataclasses.replace(self, **moved)

    def unstressed(self) -> "Prosody":
        """The same without any stress, to see what depends on it."""
        return dataclasses.replace(self, stress=0 * self.stress)


def listen(utterance: Utterance, question_ends: Sequence[float] = ()) -> Prosody:
    """Finds syllables, stress and phrases.

    A vowel is stressed if it is louder, longer and higher than those around it.

    Args:
        utterance: speech with phones.
        question_ends: where questions end, in seconds.
    """
    vowels = np.array(
        [(p.start_s, p.end_s) for p in utterance.phones if speech.is_vowel(p.name)]
    ).reshape(-1, 2)
    level = np.array([_level(utterance.wave, *vowel) for vowel in vowels])
    level = level - np.median(level) if len(level) else level
    phrases = _phrases(utterance)
    ends = np.asarray(question_ends, float).reshape(-1)
    questions = np.array([np.any(np.abs(ends - end) < 0.35) for _, end in phrases], float)
    words = np.array(utterance.word_ends)
    stress = _stress(utterance.wave, vowels, level)
    return Prosody(vowels, stress, level, phrases, questions, words)


def phone_sizes(prosody: Prosody, utterance: Utterance) -> Float[np.ndarray, " n"]:
    """Size of the mouth's movement for every phone: larger when loud, smaller when hurried."""
    middles = np.array([(p.start_s + p.end_s) / 2 for p in utterance.phones])
    if not len(prosody.vowels):
        return np.ones(len(middles))
    lengths = prosody.vowels[:, 1] - prosody.vowels[:, 0]
    loud = np.clip(1 + 0.035 * prosody.level, 0.7, 1.2)
    slow = np.clip((lengths / np.median(lengths)) ** 0.2, 0.85, 1.15)
    return np.interp(middles, prosody.vowels.mean(1), loud * slow)


def _level(wave: np.ndarray, start_s: float, end_s: float) -> float:
    part = wave[round(start_s * SAMPLE_RATE) : max(round(end_s * SAMPLE_RATE), 1)]
    return float(10 * np.log10(np.mean(np.square(part)) + 1e-8)) if len(part) else -80.0


def _pitch(wave: np.ndarray, middle_s: float) -> float:
    """Logarithm of the fundamental frequency around a time; NaN where there is none."""
    low, high = (SAMPLE_RATE // hz for hz in reversed(_PITCH_HZ))
    first = max(0, round(middle_s * SAMPLE_RATE) - 512)
    part = wave[first : first + 1024].astype(np.float64)
    if len(part) < 1024:
        return np.nan
    power = np.abs(np.fft.rfft((part - part.mean()) * np.hanning(1024), 2048)) ** 2
    similar = np.fft.irfft(power)[: high + 1]
    lag = low + int(np.argmax(similar[low:]))
    return float(np.log(SAMPLE_RATE / lag)) if similar[lag] > 0.3 * similar[0] else np.nan


def _standard(x: np.ndarray) -> np.ndarray:
    """Standardised values: unknown ones in the middle, outliers cut."""
    known = x[np.isfinite(x)]
    if len(known) < 2:
        return np.zeros(len(x))
    x = np.where(np.isfinite(x), x, np.median(known))
    return np.clip((x - np.median(known)) / (known.std() + 1e-6), -2, 2)


def _stress(wave: np.ndarray, vowels: np.ndarray, level: np.ndarray) -> np.ndarray:
    if not len(vowels):
        return np.zeros(0)
    middles, lengths = vowels.mean(1), vowels[:, 1] - vowels[:, 0]
    pitch = np.array([_pitch(wave, middle) for middle in middles])
    score = (
        0.5 * _standard(level)
        + 0.4 * _standard(np.log(np.maximum(lengths, 0.02)))
        + 0.4 * _standard(pitch)
    )
    near = np.abs(middles[:, None] - middles[None]) < _NEIGHBOUR_S
    is_peak = score >= np.where(near, score[None], -np.inf).max(1)
    return np.where(is_peak, np.clip(0.35 + 0.5 * score, 0, 1), 0)


def _phrases(utterance: Utterance) -> np.ndarray:
    """Runs of phones without a long pause between them."""
    phrases: list[list[float]] = []
    for phone in utterance.phones:
        if speech.is_silence(phone.name):
            continue
        if phrases and phone.start_s - phrases[-1][1] < _PAUSE_S:
            phrases[-1][1] = phone.end_s
        else:
            phrases.append([phone.start_s, phone.end_s])
    return np.array(phrases).reshape(-1, 2)

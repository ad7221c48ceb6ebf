"""Open microphone -> utterances: voice activity, end of turn, and the avatar's own echo.

microphone --512 samples--> detector --> VoiceBegan, VoiceLasts, VoiceEnded --> agent
sound of the avatar -------------------------^ what it explains of the microphone is no voice

An endpoint of 0.5 s and an interrupt after 0.4 s are near the defaults of LiveKit Agents.
"""

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import scipy.fft
import scipy.signal
from jaxtyping import Float

from jax_avatar.dialogue.agent import Event, VoiceBegan, VoiceEnded, VoiceLasts

__all__ = ["CHUNK", "RATE", "Detector", "Ear", "EarSettings", "Hear", "Paused", "echo_share"]

RATE = 16_000
CHUNK = 512

Detector = Callable[[Float[np.ndarray, " 512"]], float]
"""Probability of speech in the next 32 ms at 16 kHz; keeps a state of its own."""

Hear = Callable[[Float[np.ndarray, " N"]], str]
"""Samples at 16 kHz -> text, empty if no words were heard; called in a thread.

It raises ValueError where it cannot; the client gets the message."""

_ECHO_S, _PLAYED_S = 0.6, 2.5
_KEPT = 4  # utterances that may still be asked for


@dataclass(frozen=True)
class Paused:
    """Quiet in an utterance, which has so many samples and may go on."""

    samples: np.ndarray


@dataclass(frozen=True)
class EarSettings:
    """Settings of what counts as an utterance.

    Attributes:
        opens_at: probability of speech that begins an utterance.
        closes_at: probability below which it is quiet.
        begins_s: seconds of speech that begin it.
        before_s: seconds before the beginning that belong to it; words begin softly.
        pause_s: seconds of quiet after which it may be over.
        endpoint_s: seconds of quiet that end it.
        longest_s: seconds after which it is ended.
        barge_in_s: seconds of speech that interrupt the avatar.
        echo: share of the microphone's energy, explained by the avatar's own sound, from which it
            is an echo.
    """

    opens_at: float = 0.5
    closes_at: float = 0.35
    begins_s: float = 0.1
    before_s: float = 0.3
    pause_s: float = 0.2
    endpoint_s: float = 0.5
    longest_s: float = 28.0
    barge_in_s: float = 0.4
    echo: float = 0.35


class Ear:
    """Finds utterances in the sound of a microphone."""

    def __init__(self, detect: Detector, settings: EarSettings | None = None):
        """Starts in silence.

        Args:
            detect: probability of speech; used by nothing else.
            settings: defaults if not given.
        """
        self._detect, self._settings = detect, settings or EarSettings()
        self._waiting = np.zeros(0, np.float32)
        self._before: deque[np.ndarray] = deque(
            maxlen=self._chunks(self._settings.before_s + self._settings.begins_s)
        )
        self._played: deque[np.ndarray] = deque()
        self._utterances: dict[int, np.ndarray] = {}
        self._number = 0
        self.drop()

    def drop(self) -> None:
        """Forgets the utterance that is under way."""
        self._parts: list[np.ndarray] = []
        self._is_open, self._has_lasted = False, False
        self._voiced = self._quiet = 0  # chunks

    def take(self, utterance: int) -> Float[np.ndarray, " N"]:
        """Samples of an utterance at 16 kHz; empty if it is too old."""
        return self._utterances.pop(utterance, np.zeros(0, np.float32))

    def play(self, samples: Float[np.ndarray, " N"]) -> None:
        """Takes sound of the avatar at 16 kHz, when it is sent; the client plays it later."""
        self._played.append(samples)
        while sum(map(len, self._played)) - len(self._played[0]) > _PLAYED_S * RATE:
            self._played.popleft()

    def __call__(self, samples: Float[np.ndarray, " N"]) -> Iterator[Event | Paused]:
        """Takes sound of the microphone at 16 kHz; yields what happens in it."""
        self._waiting = np.concatenate([self._waiting, samples])
        while len(self._waiting) >= CHUNK:
            chunk, self._waiting = self._waiting[:CHUNK], self._waiting[CHUNK:]
            yield from self._take(chunk, self._detect(chunk))

    def _take(self, chunk: np.ndarray, speech: float) -> Iterator[Event | Paused]:
        settings = self._settings
        if not self._is_open:
            self._before.append(chunk)
            self._voiced = self._voiced + 1 if speech >= settings.opens_at else 0
            if self._voiced < self._chunks(settings.begins_s):
                return
            self._is_open, self._parts = True, list(self._before)
            self._before.clear()
            yield VoiceBegan()
            return
        self._parts.append(chunk)
        is_quiet = speech < settings.closes_at
        self._quiet = self._quiet + 1 if is_quiet else 0
        self._voiced += not is_quiet
        if not self._has_lasted and not is_quiet and self._lasts():
            self._has_lasted = True
            yield VoiceLasts()
        if self._quiet == self._chunks(settings.pause_s):
            yield Paused(np.concatenate(self._parts))
        is_long = len(self._parts) >= self._chunks(settings.longest_s)
        if is_long or self._quiet >= self._chunks(settings.endpoint_s):
            yield self._end()

    def _lasts(self) -> bool:
        """True if speech is long enough to interrupt, and not the avatar's own."""
        needed = self._chunks(self._settings.barge_in_s)
        # An echo is looked for again every 0.1 s, since the user may speak over it.
        if self._voiced < needed or (self._voiced - needed) % 3:
            return False
        if not self._played:
            return True
        heard = np.concatenate(self._parts)[-round(_ECHO_S * RATE) :]
        return echo_share(heard, np.concatenate(self._played)) < self._settings.echo

    def _end(self) -> VoiceEnded:
        self._number += 1
        self._utterances[self._number] = np.concatenate(self._parts)
        while len(self._utterances) > _KEPT:
            del self._utterances[next(iter(self._utterances))]
        quiet_s = self._quiet * CHUNK / RATE
        self.drop()
        return VoiceEnded(self._number, quiet_s)

    def _chunks(self, seconds: float) -> int:
        return max(1, round(seconds * RATE / CHUNK))


def echo_share(heard: Float[np.ndarray, " N"], played: Float[np.ndarray, " M"]) -> float:
    """Share of a microphone's energy that the sound of a loudspeaker explains, 0 to 1.

    The delay between both is found by the phase of their cross-spectrum (GCC-PHAT), the share by
    their coherence in frames of 32 ms, so a room's sound after that counts as unexplained.

    Args:
        heard: by the microphone.
        played: before that, and at the same time; longer than `heard`.

    Source: Knapp and Carter, "The generalized correlation method for estimation of time delay",
    IEEE TASSP 24(4), 1976.
    """
    if len(played) < len(heard) or not heard.any() or not played.any():
        return 0.0
    size = scipy.fft.next_fast_len(len(heard) + len(played), real=True)
    cross = scipy.fft.rfft(played, size) * np.conj(scipy.fft.rfft(heard, size))
    correlation = scipy.fft.irfft(cross / (np.abs(cross) + 1e-12), size)
    start = int(np.argmax(correlation[: len(played) - len(heard) + 1]))
    same = played[start : start + len(heard)]
    if not same.any():
        return 0.0
    frame = min(512, len(heard))
    _, coherence = scipy.signal.coherence(heard, same, RATE, nperseg=frame)
    _, power = scipy.signal.welch(heard, RATE, nperseg=frame)
    count = max(1, 2 * len(heard) // frame - 1)
    unbiased = np.clip((np.nan_to_num(coherence) - 1 / count) / (1 - 1 / count), 0, 1)
    return float((unbiased * power).sum() / power.sum())

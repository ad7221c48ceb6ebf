"""Speech that has come in and waits to be spoken: segments of any rate -> samples for blocks.

    push, push, end_segment  -->  | segment | segment, still open ... |  --> take(block) --> played

Where there is too little, silence is spoken. Speech is never stretched and never lost.
"""

from collections import deque
from dataclasses import dataclass

import numpy as np

from jax_avatar.io.audio import LowLatencyResampler
from jax_avatar.shapes import Float
from jax_avatar.streaming.sample_queue import SampleQueue

__all__ = ["JitterBuffer", "SpeechBlock", "pcm_samples"]

_RATES = (8000, 96_000)
_TOO_LARGE = 16.0  # floats beyond are integers, not sound that is a little too loud
_LATE_S = 0.25  # speech that comes later than this has paused: no hold back would help


def pcm_samples(pcm: np.ndarray | bytes) -> Float[np.ndarray, " N"]:
    """Mono samples in [-1, 1] from 16-bit PCM (little-endian where bytes) or floats.

    Raises:
        ValueError: half a sample, more than one channel, another type, not a number, or floats in
            the range of integers.
    """
    if isinstance(pcm, (bytes, bytearray, memoryview)):
        if len(pcm) % 2:
            raise ValueError(f"{len(pcm)} bytes of 16-bit PCM; expected an even number.")
        pcm = np.frombuffer(pcm, "<i2")
    if pcm.ndim != 1 or not (pcm.dtype == np.int16 or pcm.dtype.kind == "f"):
        raise ValueError(
            f"audio of type {pcm.dtype} and shape {pcm.shape}; expected one channel of int16 or "
            "float samples."
        )
    if pcm.dtype == np.int16:
        return pcm / np.float32(32768)
    if not np.isfinite(pcm).all():
        raise ValueError("audio holds values that are no numbers; expected floats in [-1, 1].")
    if (peak := float(np.abs(pcm).max(initial=0))) > _TOO_LARGE:
        raise ValueError(
            f"audio of floats up to {peak:.4g}; expected [-1, 1]: divide integers by their range."
        )
    return np.clip(pcm, -1, 1).astype(np.float32)


@dataclass(frozen=True)
class SpeechBlock:
    """Audio for a block.

    Attributes:
        samples: what is heard, silence included.
        marks: 1 where a sample is speech, 0 where silence was put.
        missing: samples of an unfinished segment that had not come in time.
    """

    samples: np.ndarray
    marks: np.ndarray
    missing: int


class JitterBuffer:
    """Segments of speech, first in first out, and how far they have been played.

    An unfinished segment keeps some samples in hand, against late arrivals: each time that one ran
    dry so many more that it would not have, and after each that did not a little less.
    """

    def __init__(self, sample_rate: int, *, target_delay: int = 0, capacity: int | None = None):
        """Starts empty.

        Args:
            sample_rate: of the samples that come out.
            target_delay: samples that an unfinished segment keeps in hand at least.
            capacity: most samples waiting; more are refused.
        """
        self.sample_rate, self._capacity = sample_rate, capacity
        self._least = self._target_delay = target_delay
        self._most = max(target_delay, round(_LATE_S * sample_rate))
        self._resampler = LowLatencyResampler(sample_rate)
        self.clear()

    def clear(self) -> None:
        """Drops everything, what is being played too."""
        self._resampler.finish()
        self._waiting = SampleQueue()
        self._pushed = self._taken = self._played = 0  # samples of speech
        self._opened = self._base = 0  # where the newest, the oldest unplayed segment begins
        self._ends: deque[int] = deque()
        self._is_open = self._has_gap = False  # the newest segment

    def __len__(self) -> int:
        """Samples that wait."""
        return len(self._waiting)

    @property
    def is_open(self) -> bool:
        """True if the newest segment is open."""
        return self._is_open

    @property
    def is_running(self) -> bool:
        """True if the newest segment is open and partly spoken."""
        return self._is_open and self._taken > self._opened

    @property
    def is_silent(self) -> bool:
        """True if the queue is empty and all taken samples have been played."""
        return not self._waiting and self._played >= self._taken

    @property
    def played_s(self) -> float:
        """Seconds of the segment at the front that have been played."""
        return (self._played - self._base) / self.sample_rate

    @property
    def is_starting(self) -> bool:
        """True if speech is queued and all taken samples have been played."""
        return bool(self._waiting) and self._played >= self._taken

    def has(self, count: int) -> bool:
        """True if all speech of the next `count` samples has arrived.

        That is all of them, with what is held back where a segment begins; or the end of one.
        """
        if not self._is_open:
            return bool(self._waiting)
        in_hand = self._target_delay if self._taken == self._opened else 0
        return len(self._waiting) >= count + in_hand

    def push(self, pcm: np.ndarray | bytes, sample_rate: int) -> None:
        """Adds speech to the newest segment, or opens one.

        Args:
            pcm: see `pcm_samples`.
            sample_rate: of `pcm`, 8000 to 96000.

        Raises:
            ValueError: a rate out of range, see `pcm_samples`, or too much is waiting already.
        """
        if not _RATES[0] <= sample_rate <= _RATES[1]:
            raise ValueError(
                f"audio of {sample_rate} Hz; expected {_RATES[0]} to {_RATES[1]} samples a second."
            )
        samples = pcm_samples(pcm)
        coming = len(samples) * self.sample_rate // sample_rate
        if self._capacity is not None and len(self._waiting) + coming > self._capacity:
            raise ValueError(
                f"{len(self._waiting) / self.sample_rate:.1f} s of audio wait already, at most "
                f"{self._capacity / self.sample_rate:.0f} s may; send more when it has been spoken."
            )
        if not len(samples):
            return
        if not self._is_open:
            self._is_open, self._opened, self._has_gap = True, self._pushed, False
        if sample_rate != self.sample_rate:
            samples = self._resampler(samples, sample_rate)
        else:
            self._append(self._resampler.finish())
        self._append(samples)

    def end_segment(self) -> None:
        """Says that the newest segment is complete."""
        if not self._is_open:
            return
        self._append(self._resampler.finish())
        self._ends.append(self._pushed)
        self._is_open = False
        if not self._has_gap:
            self._target_delay -= (self._target_delay - self._least) // 32

    def take(self, count: int) -> SpeechBlock:
        """The next `count` samples, with silence where there is no speech.

        Of a segment that has not begun, what there is comes last, so that the rest can follow
        without a gap. One that runs dry leaves a gap once, long enough not to run dry again.
        """
        have, missing, lead = min(count, len(self._waiting)), 0, 0
        if self._is_open and self._taken == self._opened:
            have = min(count, max(0, len(self._waiting) - self._target_delay))
            lead = count - have
        elif self._is_open and have < count:
            late, have = count - have, max(0, have - self._target_delay)
            missing, self._has_gap = count - have, True
            if late <= self._most:  # twice: it was late by so much at some moment of it
                self._target_delay = min(self._target_delay + 2 * late, self._most)
        speech = self._waiting.take(have)
        self._taken += len(speech)
        gaps = (lead, count - lead - len(speech))
        return SpeechBlock(np.pad(speech, gaps), np.pad(np.ones_like(speech), gaps), missing)

    def play(self, count: int) -> list[float]:
        """Counts speech as played; returns the lengths in seconds of the segments that it ends."""
        self._played += count
        ended = []
        while self._ends and self._played >= self._ends[0]:
            end = self._ends.popleft()
            ended.append((end - self._base) / self.sample_rate)
            self._base = end
        return ended

    def _append(self, samples: np.ndarray) -> None:
        self._waiting.append(samples)
        self._pushed += len(samples)

"""Jitter buffer: segments of speech at any sample rate -> samples for blocks.

    append, append, end_segment --> | segment | segment, still open ... | --> take --> play

Missing speech becomes silence. Speech is never stretched and never lost.
"""

from collections import deque
from dataclasses import dataclass

import numpy as np

from jax_avatar.io.audio import LowLatencyResampler
from jax_avatar.shapes import Float
from jax_avatar.streaming.sample_queue import SampleQueue

__all__ = ["JitterBuffer", "SpeechBlock", "SpeechStatus", "pcm_samples"]

_RATES = (8000, 96_000)
_TOO_LARGE = 16.0  # larger floats are integers, not loud sound
_LATE_S = 0.25  # speech later than this has paused; no delay would bridge that


def pcm_samples(pcm: np.ndarray | bytes) -> Float[np.ndarray, " N"]:
    """Mono samples in [-1, 1] from 16-bit PCM (little-endian where bytes) or floats.

    Raises:
        ValueError: half a sample, more than one channel, another type, NaN or infinity, or floats
            in the range of integers.
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
        raise ValueError("audio holds NaN or infinity; expected floats in [-1, 1].")
    if (peak := float(np.abs(pcm).max(initial=0))) > _TOO_LARGE:
        raise ValueError(
            f"audio of floats up to {peak:.4g}; expected [-1, 1]: divide integers by their range."
        )
    return np.clip(pcm, -1, 1).astype(np.float32)


@dataclass(frozen=True)
class SpeechBlock:
    """Audio of a block.

    Attributes:
        samples: speech and inserted silence.
        marks: of each sample, 1 for speech, 0 for inserted silence.
        missing: samples of an unfinished segment that were late.
    """

    samples: np.ndarray
    marks: np.ndarray
    missing: int


@dataclass(frozen=True)
class SpeechStatus:
    """Speech for the next block.

    Attributes:
        is_enough: True if a whole block of it has arrived, or its last part.
        is_starting: True if speech has arrived and all speech before it has been played.
        is_running: True if a segment is unfinished and partly taken.
    """

    is_enough: bool
    is_starting: bool
    is_running: bool


class JitterBuffer:
    """Adaptive jitter buffer of segments, and their playback position.

    An unfinished segment is delayed against late arrivals. The delay grows after an underrun, by
    the shortfall, and decays with each segment without one.
    """

    def __init__(self, sample_rate: int, *, target_delay: int = 0, capacity: int | None = None):
        """Starts empty.

        Args:
            sample_rate: of the samples taken.
            target_delay: least delay of an unfinished segment, in samples.
            capacity: most samples waiting; more are refused. Unlimited if not given.
        """
        self.sample_rate, self._capacity = sample_rate, capacity
        self._least = self._target_delay = target_delay
        self._most = max(target_delay, round(_LATE_S * sample_rate))
        self._resampler = LowLatencyResampler(sample_rate)
        self.clear()

    def clear(self) -> None:
        """Drops all segments, the one being played included."""
        self._resampler.finish()
        self._waiting = SampleQueue()
        self._pushed = self._taken = self._played = 0  # samples of speech
        self._opened = self._base = 0  # where the newest, the oldest unplayed segment begins
        self._ends: deque[int] = deque()
        self._is_open = self._has_gap = False  # the newest segment

    def __len__(self) -> int:
        """Number of samples waiting."""
        return len(self._waiting)

    @property
    def is_open(self) -> bool:
        """True if the newest segment is open."""
        return self._is_open

    @property
    def is_silent(self) -> bool:
        """True if no samples wait and all taken samples have been played."""
        return not self._waiting and self._played >= self._taken

    @property
    def played_s(self) -> float:
        """Seconds of the oldest unplayed segment that have been played."""
        return (self._played - self._base) / self.sample_rate

    def status(self, count: int) -> SpeechStatus:
        """Speech for a block of `count` samples."""
        delay = self._target_delay if self._taken == self._opened else 0
        wanted = count + delay if self._is_open else 1
        return SpeechStatus(
            is_enough=len(self._waiting) >= wanted,
            is_starting=bool(self._waiting) and self._played >= self._taken,
            is_running=self._is_open and self._taken > self._opened,
        )

    def append(self, pcm: np.ndarray | bytes, sample_rate: int) -> None:
        """Adds speech to the newest segment, or opens one.

        Args:
            pcm: see `pcm_samples`.
            sample_rate: of `pcm`, 8000 to 96000.

        Raises:
            ValueError: the rate is out of range, the buffer is full, or as `pcm_samples`.
        """
        if not _RATES[0] <= sample_rate <= _RATES[1]:
            raise ValueError(
                f"audio of {sample_rate} Hz; expected {_RATES[0]} to {_RATES[1]} samples a second."
            )
        samples = pcm_samples(pcm)
        coming = len(samples) * self.sample_rate // sample_rate
        if self._capacity is not None and len(self._waiting) + coming > self._capacity:
            raise ValueError(
                f"{len(self._waiting) / self.sample_rate:.1f} s of audio wait already; at most "
                f"{self._capacity / self.sample_rate:.0f} s may. Send more after it is spoken."
            )
        if not len(samples):
            return
        if not self._is_open:
            self._is_open, self._opened, self._has_gap = True, self._pushed, False
        if sample_rate != self.sample_rate:
            samples = self._resampler(samples, sample_rate)
        else:
            self._add(self._resampler.finish())
        self._add(samples)

    def end_segment(self) -> None:
        """Marks the newest segment as complete."""
        if not self._is_open:
            return
        self._add(self._resampler.finish())
        self._ends.append(self._pushed)
        self._is_open = False
        if not self._has_gap:
            self._target_delay -= (self._target_delay - self._least) // 32

    def take(self, count: int) -> SpeechBlock:
        """Removes the next `count` samples, padded with silence.

        A segment that begins is aligned to the end, so that the rest follows without a gap. An
        underrun leaves one gap, long enough to prevent the next one.
        """
        have, missing, lead = min(count, len(self._waiting)), 0, 0
        if self._is_open and self._taken == self._opened:
            have = min(count, max(0, len(self._waiting) - self._target_delay))
            lead = count - have
        elif self._is_open and have < count:
            late, have = count - have, max(0, have - self._target_delay)
            missing, self._has_gap = count - have, True
            if late <= self._most:  # twice, since the shortfall is a lower bound of the lateness
                self._target_delay = min(self._target_delay + 2 * late, self._most)
        speech = self._waiting.take(have)
        self._taken += len(speech)
        gaps = (lead, count - lead - len(speech))
        return SpeechBlock(np.pad(speech, gaps), np.pad(np.ones_like(speech), gaps), missing)

    def play(self, count: int) -> list[float]:
        """Counts speech as played; returns the lengths in seconds of segments that end by it."""
        self._played += count
        ended = []
        while self._ends and self._played >= self._ends[0]:
            end = self._ends.popleft()
            ended.append((end - self._base) / self.sample_rate)
            self._base = end
        return ended

    def _add(self, samples: np.ndarray) -> None:
        self._waiting.append(samples)
        self._pushed += len(samples)

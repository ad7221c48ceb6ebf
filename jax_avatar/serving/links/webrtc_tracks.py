"""Media tracks of WebRTC: chunks -> frames and pieces of sound, each sent at its own time.

A receiver synchronises picture and sound by time stamps and by arrival, so neither leaves with its
chunk.
"""

import asyncio
import time
from fractions import Fraction
from typing import Any

import av
import numpy as np
from aiortc import MediaStreamTrack

from jax_avatar.io.audio import LowLatencyResampler
from jax_avatar.live.session import LiveChunk
from jax_avatar.streaming.format import StreamFormat
from jax_avatar.streaming.sample_queue import SampleQueue

__all__ = ["SOUND_RATE", "ChunkPlayer", "TimedTrack"]

SOUND_RATE = 48_000
"""Samples per second of Opus."""

_PIECE = 960  # samples of an Opus packet, 20 ms
_VIDEO_CLOCK = 90_000
_DELAY_S = 0.04  # so that a piece of sound is whole when it is due


class TimedTrack(MediaStreamTrack):
    """Track whose frames leave at their due times.

    Attributes:
        kind: "video" or "audio".
        waiting: `(due, frame)`, due by `time.monotonic()`.
    """

    def __init__(self, kind: str, capacity: int):
        super().__init__()
        self.kind = kind
        self.waiting: asyncio.Queue[tuple[float, Any]] = asyncio.Queue(capacity)

    def put(self, due: float, frame: Any) -> None:
        """Adds a frame; drops the oldest if the track is full."""
        if self.waiting.full():
            self.waiting.get_nowait()
        self.waiting.put_nowait((due, frame))

    async def recv(self) -> Any:
        """The next frame, at its due time."""
        due, frame = await self.waiting.get()
        await asyncio.sleep(max(0.0, due - time.monotonic()))
        return frame


class ChunkPlayer:
    """Puts chunks on two tracks, stamped by the clock of the video.

    Attributes:
        picture: track of frames.
        sound: track of pieces of 20 ms.
    """

    def __init__(self, form: StreamFormat):
        self.picture, self.sound = TimedTrack("video", 2 * form.fps), TimedTrack("audio", 100)
        self._fps, self._rate = form.fps, form.sample_rate
        self._resample, self._waiting = LowLatencyResampler(SOUND_RATE), SampleQueue()
        self._frames = self._samples = 0

    def play(self, chunk: LiveChunk) -> None:
        """Adds a chunk that is due now."""
        start = time.monotonic() + _DELAY_S - chunk.start_s
        for pixels in chunk.frames:
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
            frame.pts = round(self._frames * _VIDEO_CLOCK / self._fps)
            frame.time_base = Fraction(1, _VIDEO_CLOCK)
            self.picture.put(start + self._frames / self._fps, frame)
            self._frames += 1
        self._waiting.append(self._resample(chunk.sound, self._rate))
        while len(self._waiting) >= _PIECE:
            samples = (np.clip(self._waiting.take(_PIECE), -1, 1) * 32767).astype(np.int16)
            piece = av.AudioFrame.from_ndarray(samples[None], format="s16", layout="mono")
            piece.sample_rate = SOUND_RATE
            piece.pts, piece.time_base = self._samples, Fraction(1, SOUND_RATE)
            self.sound.put(start + self._samples / SOUND_RATE, piece)
            self._samples += _PIECE

"""Video of a live session, in the form that LiveKit's `AvatarRunner` expects."""

import asyncio
from collections.abc import AsyncIterator

import numpy as np
from livekit import rtc
from livekit.agents.voice.avatar import AudioSegmentEnd, VideoGenerator

from jax_avatar.io.watermark import mark
from jax_avatar.live.session import LiveChunk, LiveSession
from jax_avatar.serving.links.livekit.segments import SegmentReceiver

__all__ = ["AvatarVideoGenerator"]

_RETRY_S = 0.05  # while the jitter buffer is full


class AvatarVideoGenerator(VideoGenerator):
    """Speech in, picture and sound out.

    Between segments there is picture only, since every piece of sound counts as played. A segment's
    sound begins with the frame in which its speech begins, which keeps both in sync.
    """

    def __init__(
        self,
        live: LiveSession,
        *,
        is_marked: bool = True,
        receiver: SegmentReceiver | None = None,
    ):
        """Uses a session that is opened and closed elsewhere.

        Args:
            live: used by nothing else that pushes audio or iterates.
            is_marked: True to put the watermark into every frame.
            receiver: gets the reports of playback.
        """
        self._live, self._is_marked, self._receiver = live, is_marked, receiver
        self._rate = live.session.format.sample_rate
        self._per_frame = live.session.format.samples_per_frame
        self._is_speaking = False
        self._clears = 0
        self._played_s = 0.0  # of the current segment

    async def push_audio(self, frame: rtc.AudioFrame | AudioSegmentEnd) -> None:
        """Adds speech, or ends a segment; waits while the jitter buffer is full."""
        if isinstance(frame, AudioSegmentEnd):
            self._live.end_segment()
            return
        clears = self._clears
        while self._live.queued_s + frame.duration > self._live.settings.most_waiting_s:
            await asyncio.sleep(_RETRY_S)
            if self._clears != clears:  # of an interrupted segment
                return
        channels = np.frombuffer(frame.data, np.int16).reshape(-1, frame.num_channels)
        self._live.push_audio(channels.mean(1, dtype=np.float32) / 32768, frame.sample_rate)

    async def clear_buffer(self) -> None:
        """Drops speech; frames that exist already are shown without sound."""
        self._clears += 1
        self._is_speaking = False
        self._live.clear()
        if self._receiver:
            self._receiver.report_cleared(self._played_s)
        self._played_s = 0.0

    def __aiter__(self) -> AsyncIterator[rtc.VideoFrame | rtc.AudioFrame | AudioSegmentEnd]:
        return self._stream()

    async def _stream(self) -> AsyncIterator[rtc.VideoFrame | rtc.AudioFrame | AudioSegmentEnd]:
        async for chunk in self._live:
            clears, frames = self._clears, chunk.frames
            if self._is_marked:
                frames = await asyncio.to_thread(mark, frames)
            for number, pixels in enumerate(frames):
                yield _picture(pixels)
                # An interrupt may come while the consumer holds the frame.
                if clears == self._clears and (sound := self._sound(chunk, number)):
                    yield sound
                    if clears == self._clears:
                        self._count(sound.duration)
            for length_s in _ended_segments(chunk):
                if clears == self._clears:
                    self._is_speaking = False
                    self._finish(length_s)
                    yield AudioSegmentEnd()

    def _count(self, duration_s: float) -> None:
        if self._receiver and not self._played_s:
            self._receiver.report_started()
        self._played_s += duration_s

    def _finish(self, length_s: float) -> None:
        if self._receiver:
            # Gaps count. The sound of a very short segment may be in the last piece of another.
            self._receiver.report_finished(max(self._played_s, length_s))
        self._played_s = 0.0

    def _sound(self, chunk: LiveChunk, number: int) -> rtc.AudioFrame | None:
        """Sound of a frame of a chunk, during a segment only."""
        part = slice(number * self._per_frame, (number + 1) * self._per_frame)
        self._is_speaking |= bool(chunk.marks[part].any())
        if not self._is_speaking:
            return None
        samples = (np.clip(chunk.sound[part], -1, 1) * 32767).astype(np.int16)
        return rtc.AudioFrame(samples.tobytes(), self._rate, 1, len(samples))


def _picture(pixels: np.ndarray) -> rtc.VideoFrame:
    height, width = pixels.shape[:2]
    return rtc.VideoFrame(width, height, rtc.VideoBufferType.RGB24, pixels.tobytes())


def _ended_segments(chunk: LiveChunk) -> list[float]:
    """Lengths in seconds of the segments that end in a chunk."""
    ends = [event.data for event in chunk.events if event.name == "playback_finished"]
    return [data["position_s"] for data in ends if not data["interrupted"]]

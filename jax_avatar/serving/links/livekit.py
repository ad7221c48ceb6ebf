"""The avatar of a LiveKit agent: its speech comes as a byte stream, picture and sound go to a room.

agent --lk.audio_stream--> SegmentReceiver --> AvatarVideoGenerator (LiveSession)
  ^--lk.playback_started, lk.playback_finished--'       |
room  <--tracks-- AvatarRunner <--frames, sound---------'
"""

import asyncio
import datetime
from collections.abc import AsyncIterator, Callable
from typing import Any

import numpy as np
from livekit import api, rtc
from livekit.agents.utils import wait_for_participant
from livekit.agents.voice.avatar import (
    AudioReceiver,
    AudioSegmentEnd,
    AvatarOptions,
    AvatarRunner,
    DataStreamAudioReceiver,
    VideoGenerator,
)

from jax_avatar.io.watermark import mark
from jax_avatar.live.session import LiveChunk, LiveSession
from jax_avatar.serving.tasks import until_first_ends

__all__ = [
    "AvatarVideoGenerator",
    "SegmentReceiver",
    "avatar_options",
    "avatar_token",
    "serve_room",
]

_ON_BEHALF = "lk.publish_on_behalf"  # attribute: whose avatar this is
_ROOM_TO_SPARE_S = 0.05  # between two looks whether more speech may wait


class SegmentReceiver(AudioReceiver):
    """Speech of an agent, and the account of its segments: each is told to be finished, once.

    An agent waits for that, one word per stream it has opened. `AvatarRunner` has one flag for all
    of them, set when it reads sound and taken back at an end: it says nothing of a second segment
    that was read while the first one played, nor of one that is cleared before any sound of it was
    read. So its notifications are dropped, and the generator gives them. Streams that were opened
    before a clear and not read yet are dropped, too.
    """

    def __init__(self, room: Any, *, sender_identity: str):
        """Receives through the package's own receiver.

        Args:
            room: an `rtc.Room`, joined.
            sender_identity: of the agent.
        """
        super().__init__()
        counted = _StreamCountingRoom(room, self._counted)
        self._inner = DataStreamAudioReceiver(counted, sender_identity=sender_identity)
        self._num_open = 0  # segments begun and not yet finished
        self._num_cleared = 0

    async def start(self) -> None:
        """Begins to receive, once the agent is there."""
        await self._inner.start()
        self._inner.on("clear_buffer", self._clear)

    def __aiter__(self) -> AsyncIterator[rtc.AudioFrame | AudioSegmentEnd]:
        return aiter(self._inner)

    async def aclose(self) -> None:
        """Ends it."""
        await self._inner.aclose()

    def notify_playback_started(self) -> None:
        """Nothing: see `tell_started`."""

    def notify_playback_finished(self, playback_position: float, interrupted: bool) -> None:
        """Nothing: see `tell_finished` and `tell_cleared`."""

    def tell_started(self) -> None:
        """The first sound of a segment is played."""
        self._inner.notify_playback_started()

    def tell_finished(self, position_s: float) -> None:
        """A segment was played to its end."""
        self._num_open = max(0, self._num_open - 1)
        self._inner.notify_playback_finished(position_s, interrupted=False)

    def tell_cleared(self, position_s: float) -> None:
        """All that was begun is over: the first was played up to a position, the others not."""
        for number in range(self._num_open):
            self._inner.notify_playback_finished(0.0 if number else position_s, interrupted=True)
        self._num_open = 0

    def _clear(self) -> None:
        self._num_cleared += 1
        self.emit("clear_buffer")

    def _counted(self, reader: Any) -> Any:
        """A stream that is a segment, until it is cleared."""
        self._num_open += 1
        cleared = self._num_cleared
        return _Stream(reader, lambda: self._num_cleared != cleared)


class _Stream:
    """A reader that ends when it is over."""

    def __init__(self, reader: Any, is_over: Callable[[], bool]):
        self._reader, self._is_over = reader, is_over

    def __getattr__(self, name: str) -> Any:
        return getattr(self._reader, name)

    def __aiter__(self) -> "_Stream":
        return self

    async def __anext__(self) -> bytes:
        if self._is_over():
            raise StopAsyncIteration
        part = await self._reader.__anext__()
        if self._is_over():
            raise StopAsyncIteration
        return part


class _StreamCountingRoom:
    """A room whose byte streams are wrapped before their handler gets them."""

    def __init__(self, room: Any, wrap: Callable[[Any], Any]):
        self._room, self._wrap = room, wrap

    def __getattr__(self, name: str) -> Any:
        return getattr(self._room, name)

    def register_byte_stream_handler(self, topic: str, handler: Callable[..., None]) -> None:
        def noting(reader: Any, participant: str) -> None:
            handler(self._wrap(reader), participant)

        self._room.register_byte_stream_handler(topic, noting)


class AvatarVideoGenerator(VideoGenerator):
    """Speech in, picture and sound out, in the form that `AvatarRunner` expects.

    Between segments there is picture only: every piece of sound counts as played. A segment's
    sound begins with the frame in which its speech does, so that both stay together.
    """

    def __init__(
        self,
        live: LiveSession,
        *,
        is_marked: bool = True,
        receiver: SegmentReceiver | None = None,
    ):
        """Speaks through a session that is opened and closed elsewhere.

        Args:
            live: nobody else may push audio to it or iterate over it.
            is_marked: puts the watermark into every frame.
            receiver: is told when segments begin and end to be heard.
        """
        self._live, self._is_marked, self._receiver = live, is_marked, receiver
        self._rate = live.session.format.sample_rate
        self._per_frame = live.session.format.samples_per_frame
        self._is_speaking = False
        self._clears = 0
        self._played_s = 0.0  # of the segment that is being spoken

    async def push_audio(self, frame: rtc.AudioFrame | AudioSegmentEnd) -> None:
        """Adds speech, or ends a segment; waits while too much is waiting."""
        if isinstance(frame, AudioSegmentEnd):
            self._live.end_segment()
            return
        clears = self._clears
        while self._live.queued_s + frame.duration > self._live.settings.most_waiting_s:
            await asyncio.sleep(_ROOM_TO_SPARE_S)
            if self._clears != clears:  # it belonged to what was interrupted
                return
        channels = np.frombuffer(frame.data, np.int16).reshape(-1, frame.num_channels)
        self._live.push_audio(channels.mean(1, dtype=np.float32) / 32768, frame.sample_rate)

    async def clear_buffer(self) -> None:
        """Drops speech; what is on its way already is shown without sound."""
        self._clears += 1
        self._is_speaking = False
        self._live.clear()
        if self._receiver:
            self._receiver.tell_cleared(self._played_s)
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
                # Whoever takes a frame may be slow, and somebody may interrupt meanwhile.
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
            self._receiver.tell_started()
        self._played_s += duration_s

    def _finish(self, length_s: float) -> None:
        if self._receiver:
            # Gaps within it count; the sound of a very short one may be another's last piece.
            self._receiver.tell_finished(max(self._played_s, length_s))
        self._played_s = 0.0

    def _sound(self, chunk: LiveChunk, number: int) -> rtc.AudioFrame | None:
        """Audio of a frame of a chunk, if a segment is being spoken."""
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
    """Seconds of each segment that was spoken to its end in this chunk."""
    ends = [event.data for event in chunk.events if event.name == "playback_finished"]
    return [data["position_s"] for data in ends if not data["interrupted"]]


def avatar_options(live: LiveSession) -> AvatarOptions:
    """Sizes and rates of the tracks."""
    form = live.session.format
    return AvatarOptions(
        video_width=form.width,
        video_height=form.height,
        video_fps=form.fps,
        audio_sample_rate=form.sample_rate,
        audio_channels=1,
    )


def avatar_token(
    key: str, secret: str, room: str, identity: str, *, agent: str | None = None, hours: float = 6
) -> str:
    """Access token to join a room and publish in it.

    Args:
        key: of the LiveKit project.
        secret: that belongs to it.
        room: to join.
        identity: of the avatar.
        agent: on whose behalf it speaks; frontends then show both as one.
        hours: it is good for joining.
    """
    token = api.AccessToken(key, secret).with_identity(identity).with_kind("agent")
    token = token.with_ttl(datetime.timedelta(hours=hours))
    token = token.with_grants(api.VideoGrants(room_join=True, room=room))
    if agent:
        token = token.with_attributes({_ON_BEHALF: agent})
    return token.to_jwt()


async def serve_room(
    live: LiveSession, room: rtc.Room, *, agent: str | None = None, is_marked: bool = True
) -> None:
    """Runs the avatar for an agent until either leaves the room.

    Args:
        live: open; at its start.
        room: joined already.
        agent: identity of the participant that speaks; the first agent that comes if not given.
        is_marked: puts the watermark into every frame.

    Raises:
        RuntimeError: the room went away before the agent came.
    """
    over = asyncio.Event()
    room.on("disconnected", lambda *_: over.set())
    kind = None if agent else rtc.ParticipantKind.PARTICIPANT_KIND_AGENT
    speaker = (await wait_for_participant(room, identity=agent, kind=kind)).identity
    room.on("participant_disconnected", lambda p: over.set() if p.identity == speaker else None)
    receiver = SegmentReceiver(room, sender_identity=speaker)
    runner = AvatarRunner(
        room,
        audio_recv=receiver,
        video_gen=AvatarVideoGenerator(live, is_marked=is_marked, receiver=receiver),
        options=avatar_options(live),
    )
    await runner.start()
    try:
        await until_first_ends(over.wait(), runner.wait_for_complete())
    finally:
        await runner.aclose()

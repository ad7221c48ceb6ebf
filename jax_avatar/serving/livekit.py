"""The avatar of a LiveKit agent: its speech comes as a byte stream, picture and sound go to a room.

agent --lk.audio_stream--> DataStreamAudioReceiver --> AvatarVideoGenerator (LiveSession)
room  <--tracks-- AvatarRunner <--frames, sound, ends of segments--'
"""

import asyncio
import contextlib
import datetime
from collections.abc import AsyncIterator

import numpy as np
from livekit import api, rtc
from livekit.agents.utils import wait_for_participant
from livekit.agents.voice.avatar import (
    AudioSegmentEnd,
    AvatarOptions,
    AvatarRunner,
    DataStreamAudioReceiver,
    VideoGenerator,
)

from jax_avatar.io.watermark import mark
from jax_avatar.serving.tasks import until_first_ends
from jax_avatar.streaming.live import LiveChunk, LiveSession

__all__ = ["AvatarVideoGenerator", "avatar_options", "avatar_token", "serve_room"]

_ON_BEHALF = "lk.publish_on_behalf"  # attribute: whose avatar this is
_ROOM_TO_SPARE_S = 0.05  # between two looks whether more speech may wait
_MOST_IN_HAND_S = 1.0  # the agent waits 2 s for the whole of an interrupt


class AvatarVideoGenerator(VideoGenerator):
    """Speech in, picture and sound out, as `AvatarRunner` wants them.

    Between segments there is picture only: the runner counts every piece of sound as played. A
    segment's sound begins with the frame in which its speech does, so that both stay together.
    """

    def __init__(self, live: LiveSession, *, is_marked: bool = True):
        """Speaks through a session that somebody else opens and closes.

        Args:
            live: nobody else may push audio to it or iterate over it.
            is_marked: puts the watermark into every frame.
        """
        self._live, self._is_marked = live, is_marked
        self._rate = live.core.speech.sample_rate
        self._per_frame = live.core.speech.samples_per_frame
        self._is_speaking = False
        self._clears = 0
        self._is_taken = asyncio.Event()  # no piece of sound is in the runner's hands
        self._is_taken.set()

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
        """Drops speech; what is on its way already is shown without sound.

        Returns when the runner has put away the piece of sound that it holds. It sets its position
        to 0 next, and would take that piece for the beginning of the next segment.
        """
        self._clears += 1
        self._is_speaking = False
        self._live.clear()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_MOST_IN_HAND_S):
                await self._is_taken.wait()

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
                    self._is_taken.clear()
                    try:
                        yield sound
                    finally:
                        self._is_taken.set()
            if clears == self._clears and _ends_segment(chunk):
                self._is_speaking = False
                yield AudioSegmentEnd()

    def _sound(self, chunk: LiveChunk, number: int) -> rtc.AudioFrame | None:
        """What belongs to a frame of a chunk, if a segment is being spoken."""
        part = slice(number * self._per_frame, (number + 1) * self._per_frame)
        self._is_speaking |= bool(chunk.marks[part].any())
        if not self._is_speaking:
            return None
        samples = (np.clip(chunk.sound[part], -1, 1) * 32767).astype(np.int16)
        return rtc.AudioFrame(samples.tobytes(), self._rate, 1, len(samples))


def _picture(pixels: np.ndarray) -> rtc.VideoFrame:
    height, width = pixels.shape[:2]
    return rtc.VideoFrame(width, height, rtc.VideoBufferType.RGB24, pixels.tobytes())


def _ends_segment(chunk: LiveChunk) -> bool:
    """Whether a segment was spoken to its end in this chunk."""
    return any(
        event.name == "playback_finished" and not event.data["interrupted"]
        for event in chunk.events
    )


def avatar_options(live: LiveSession) -> AvatarOptions:
    """Sizes and rates of the tracks."""
    height, width = live.core.frame_size
    return AvatarOptions(
        video_width=width,
        video_height=height,
        video_fps=live.core.model.settings.fps,
        audio_sample_rate=live.core.speech.sample_rate,
        audio_channels=1,
    )


def avatar_token(
    key: str, secret: str, room: str, identity: str, *, agent: str | None = None, hours: float = 6
) -> str:
    """Leave to join a room and to publish there.

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
    """Lends an agent its face until either leaves the room.

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
    runner = AvatarRunner(
        room,
        audio_recv=DataStreamAudioReceiver(room, sender_identity=speaker),
        video_gen=AvatarVideoGenerator(live, is_marked=is_marked),
        options=avatar_options(live),
    )
    await runner.start()
    try:
        await until_first_ends(over.wait(), runner.wait_for_complete())
    finally:
        await runner.aclose()

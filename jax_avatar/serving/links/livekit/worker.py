"""Worker that is the avatar of a LiveKit agent.

agent --lk.audio_stream--> SegmentReceiver --> AvatarVideoGenerator (LiveSession)
  ^--lk.playback_started, lk.playback_finished--'       |
room  <--tracks-- AvatarRunner <--frames, sound---------'
"""

import asyncio

from livekit import rtc
from livekit.agents.utils import wait_for_participant
from livekit.agents.voice.avatar import AvatarOptions, AvatarRunner

from jax_avatar.live.session import LiveSession
from jax_avatar.serving.links.livekit.segments import SegmentReceiver
from jax_avatar.serving.links.livekit.video import AvatarVideoGenerator
from jax_avatar.serving.tasks import until_first_ends

__all__ = ["avatar_options", "serve_room"]


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


async def serve_room(
    live: LiveSession, room: rtc.Room, *, agent: str | None = None, is_marked: bool = True
) -> None:
    """Runs the avatar for an agent until either leaves the room.

    Args:
        live: open; at its start.
        room: joined already.
        agent: identity of the participant that speaks; the first agent that joins if not given.
        is_marked: True to put the watermark into every frame.

    Raises:
        RuntimeError: the room closed before the agent joined.
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

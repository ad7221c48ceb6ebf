"""Avatar of a LiveKit agent: joins its room and speaks the agent's speech.

python launch/livekit_worker.py --url wss://HOST --room ROOM --agent AGENT
python launch/livekit_worker.py --mesh 5 --checkpoint FOLDER --url ws://localhost:7880 --token TOKEN
"""

import asyncio
import os
import signal
import sys
from pathlib import Path

# More host threads than cores: collectives of many fake CPU devices must not starve each other.
os.environ.setdefault("NPROC", "16")
sys.path.insert(0, str(Path(__file__).parents[1]))

from absl import flags

from jax_avatar.io.image import load_image
from jax_avatar.live.session import LiveSession, LiveSettings
from jax_avatar.streaming.plan import stream_layout
from jax_avatar.streaming.session import AvatarSession, num_slices
from jax_avatar.weights.folder import ASSETS, DEFAULT, load_model, load_settings
from launch import cli
from launch.cli import say
from launch.common import log_warnings, prepare_jax, prepare_portrait

with cli.needs_extra("livekit"):
    from livekit import rtc

    from jax_avatar.serving.links.livekit.access import avatar_token
    from jax_avatar.serving.links.livekit.worker import serve_room

flags.DEFINE_string("mesh", "1", cli.MESH)
flags.DEFINE_string("checkpoint", str(DEFAULT), cli.CHECKPOINT)
flags.DEFINE_enum("dtype", "", ["", "int8", "fp8"], cli.DTYPE)
flags.DEFINE_alias("weights", "dtype")  # its name until 0.1
flags.DEFINE_string("image", str(ASSETS / "portraits" / "amara.png"), "portrait")
flags.DEFINE_integer("face", None, cli.FACE, lower_bound=1)
flags.DEFINE_string("size", None, cli.STREAM_SIZE)
flags.DEFINE_string("url", None, "of the LiveKit server, ws:// or wss://; else LIVEKIT_URL")
flags.DEFINE_string(
    "token",
    None,
    "to join with, else LIVEKIT_TOKEN; else one is made with LIVEKIT_API_KEY and "
    "LIVEKIT_API_SECRET for --room",
)
flags.DEFINE_string("room", None, "to join, where the token is made here")
flags.DEFINE_string("identity", "avatar", "of the avatar, where the token is made here")
flags.DEFINE_string("agent", None, "identity of the agent that speaks; the first one if not given")
flags.DEFINE_bool("watermark", True, "mark every frame as generated, invisibly")
FLAGS = flags.FLAGS


def read_access() -> tuple[str, str]:
    """Address and token."""
    url = FLAGS.url or os.environ.get("LIVEKIT_URL", "")
    if not url.startswith(("ws://", "wss://", "http://", "https://")):
        raise ValueError(
            f"LiveKit server {url!r}; expected ws://HOST:PORT or wss://HOST; pass --url or set "
            "LIVEKIT_URL."
        )
    if token := FLAGS.token or os.environ.get("LIVEKIT_TOKEN"):
        return url, token
    key, secret = (os.environ.get(f"LIVEKIT_API_{name}") for name in ("KEY", "SECRET"))
    if not (key and secret and FLAGS.room):
        raise ValueError(
            "no way into a room; pass --token, or --room with LIVEKIT_API_KEY and "
            "LIVEKIT_API_SECRET set."
        )
    return url, avatar_token(key, secret, FLAGS.room, FLAGS.identity, agent=FLAGS.agent)


def load_session() -> AvatarSession:
    """The model with its portrait, compiled."""
    settings, image = load_settings(FLAGS.checkpoint), load_image(FLAGS.image)
    layout = stream_layout(settings, FLAGS.mesh)
    portrait = prepare_portrait(
        FLAGS.image, image, FLAGS.checkpoint, settings, FLAGS.size, face=FLAGS.face
    ).reference
    prepare_jax(num_slices(layout))
    session = AvatarSession(load_model(FLAGS.checkpoint, weights=FLAGS.dtype), portrait, layout)
    session.warm_up()
    return session


async def work(session: AvatarSession, url: str, token: str) -> None:
    """Joins, serves, leaves."""
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, asyncio.current_task().cancel)
    room = rtc.Room()
    try:
        await room.connect(url, token, rtc.RoomOptions(auto_subscribe=False))
    except rtc.ConnectError as error:
        raise ValueError(f"cannot join a room at {url}: {error}") from None
    say(f"joined {room.name} as {room.local_participant.identity}")
    try:
        # Frame by frame, so that sound begins with the frame in which speech does.
        async with LiveSession(session, LiveSettings(chunk_frames=1)) as live:
            await serve_room(live, room, agent=FLAGS.agent, is_marked=FLAGS.watermark)
    finally:
        await room.disconnect()
    say("the agent has left")


def run() -> None:
    log_warnings()
    url, token = read_access()
    say("compiling")
    try:
        asyncio.run(work(load_session(), url, token))
    except asyncio.CancelledError:  # by SIGTERM
        say("stopped")


if __name__ == "__main__":
    cli.run_with_flags(run)

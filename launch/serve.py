"""Live avatar in the browser: the portrait speaks along with the microphone.

python launch/serve.py --mesh 1
python launch/serve.py --mesh 5 --checkpoint FOLDER --host 0.0.0.0 --port 8000 --token SECRET
"""

import functools
import os
import secrets
import sys
from pathlib import Path

# More host threads than cores: collectives of many fake CPU devices must not starve each other.
os.environ.setdefault("NPROC", "16")
sys.path.insert(0, str(Path(__file__).parents[1]))

from absl import flags

from jax_avatar.io.image import load_image
from jax_avatar.live.session import LiveSettings
from jax_avatar.portraits.view import FRAMES, PortraitView
from jax_avatar.streaming.plan import stream_layout
from jax_avatar.streaming.prompts import prompt_encoder, prompt_states
from jax_avatar.streaming.session import AvatarSession, num_slices
from jax_avatar.weights.folder import ASSETS, DEFAULT, has_text_encoder, load_model, load_settings
from launch import cli
from launch.cli import say
from launch.common import log_warnings, prepare_jax, prepare_portrait

with cli.needs_extra("serve"):
    from jax_avatar.dialogue.demo_brain import DEMO
    from jax_avatar.dialogue.driver import Parts
    from jax_avatar.dialogue.tts import Speak, find_speech
    from jax_avatar.serving.pool import SessionPool
    from jax_avatar.serving.server import serve
    from jax_avatar.serving.server_state import ServerState

flags.DEFINE_string("mesh", "1", cli.MESH)
flags.DEFINE_string("checkpoint", str(DEFAULT), cli.CHECKPOINT)
flags.DEFINE_enum("dtype", "", ["", "int8", "fp8"], cli.DTYPE)
flags.DEFINE_alias("weights", "dtype")  # its name until 0.1
flags.DEFINE_string(
    "image",
    str(ASSETS / "portraits" / "amara.png"),
    "portrait of clients that bring none; its shape is that of all, where the model leaves it free",
)
flags.DEFINE_integer("face", None, cli.FACE, lower_bound=1)
flags.DEFINE_enum("frame", "crop", FRAMES, cli.FRAME)
flags.DEFINE_string("size", None, cli.STREAM_SIZE)
flags.DEFINE_string("host", "127.0.0.1", "address to listen on; 0.0.0.0 for everybody")
flags.DEFINE_integer("port", 8000, "to listen on", lower_bound=1, upper_bound=65535)
flags.DEFINE_string("token", None, "that clients must know; made up for a public --host")
flags.DEFINE_integer("sessions", 16, "at most, however many would fit", lower_bound=1)
flags.DEFINE_string(
    "tts",
    "auto",
    "speaks: hibari, flite, auto (the first that is installed), the address of an "
    "OpenAI-compatible endpoint (its key in TTS_API_KEY), or MODULE:NAME of text -> (samples, "
    "rate); empty: none",
)
flags.DEFINE_string("tts_model", "", "model at the address of --tts")
flags.DEFINE_string("tts_voice", "", "voice at the address of --tts")
flags.DEFINE_bool("talk", False, "the avatar listens and answers by itself")
flags.DEFINE_string(
    "llm",
    DEMO,
    "answers: demo (scripted, no model), the address of an OpenAI-compatible endpoint (its key in "
    "LLM_API_KEY), or a GGUF file",
)
flags.DEFINE_string("llm_model", "", "model at the address of --llm")
flags.DEFINE_string("llm_system", "", "file with instructions in place of the embedded ones")
flags.DEFINE_string(
    "asr",
    "whisper",
    "hears: whisper, the address of an OpenAI-compatible endpoint (its key in ASR_API_KEY), or "
    "MODULE:NAME of samples at 16 kHz -> text; empty: typed text only",
)
flags.DEFINE_string("asr_model", "", "model at the address of --asr")
flags.DEFINE_bool("watermark", True, "mark every frame as generated, invisibly")
flags.DEFINE_float("idle_s", 300.0, "seconds without a message until a session is ended")
flags.DEFINE_float("drain_s", 30.0, "seconds that sessions may go on after SIGTERM")
flags.DEFINE_list(
    "ice",
    [],
    "stun:HOST:PORT or turn:USER:PASSWORD@HOST:PORT, where WebRTC clients cannot reach --host",
)
flags.DEFINE_string(
    "prompt_cache",
    str(Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "jax_avatar" / "prompts"),
    "folder that keeps encoded prompts; empty: none",
)
flags.DEFINE_bool("keep_text_encoder", False, "keep it loaded (11 GB at full size) for new prompts")
FLAGS = flags.FLAGS
_LOCAL = ("127.0.0.1", "localhost", "::1")


def make_pool(image) -> SessionPool:
    """Sessions that are built when the server starts; what cannot be is refused here."""
    settings = load_settings(FLAGS.checkpoint)
    layout = stream_layout(settings, FLAGS.mesh)
    portrait = prepare_portrait(
        FLAGS.image, image, FLAGS.checkpoint, settings, FLAGS.size,
        face=FLAGS.face, frame=FLAGS.frame,
    ).reference  # fmt: skip
    prepare_jax(num_slices(layout))
    model = load_model(FLAGS.checkpoint, weights=FLAGS.dtype)

    def build(shared) -> AvatarSession:
        return AvatarSession(shared or model, portrait, layout)

    return SessionPool(build, most=FLAGS.sessions)


def key(name: str) -> str:
    """Access token of an endpoint, from the environment."""
    return os.environ.get(name, "")


def voice() -> Speak | None:
    """The synthesiser of --tts, if there is one."""
    with cli.needs_extra("talk"):
        speak = find_speech(FLAGS.tts, FLAGS.tts_model, FLAGS.tts_voice, key=key("TTS_API_KEY"))
    if FLAGS.tts and speak is None:
        say(
            'typed text is not spoken; that takes: pip install ".[talk]", apt-get install flite, '
            "or --tts MODULE:NAME"
        )
    return speak


def conversation(speak: Speak | None) -> Parts:
    """Ear, mind and voice of --talk; loads their weights."""
    if speak is None:
        raise ValueError(
            f"--talk takes a voice, --tts {FLAGS.tts or '(empty)'} is none; see --help."
        )
    with cli.needs_extra("talk"):
        from jax_avatar.dialogue.hearing import find_hearing, silero
        from jax_avatar.dialogue.minds import find_mind

        hear = (
            find_hearing(FLAGS.asr, FLAGS.asr_model, key=key("ASR_API_KEY")) if FLAGS.asr else None
        )
        detector = silero if hear else None
        if detector:
            detector()  # checks its weights now
    with cli.needs_extra("gguf"):
        think = find_mind(
            FLAGS.llm, FLAGS.llm_model, key=key("LLM_API_KEY"), system=FLAGS.llm_system
        )
    if FLAGS.llm == DEMO:
        say(
            "answers come from the demo brain, a script; docs/interactive.md tells how to connect "
            "a language model"
        )
    return Parts(hear, detector, think, speak)


def ice_servers() -> tuple[str, ...]:
    """ICE servers of --ice, each checked."""
    if FLAGS.ice:
        try:
            from jax_avatar.serving.links.webrtc import ice_server
        except ModuleNotFoundError:
            raise ValueError('--ice is for WebRTC; it needs: pip install ".[webrtc]"') from None
        for url in FLAGS.ice:
            ice_server(url)
    return tuple(FLAGS.ice)


def run() -> None:
    log_warnings()
    cli.check_finite(FLAGS)
    for name in ("idle_s", "drain_s"):
        if FLAGS[name].value < 0:
            raise ValueError(f"--{name} {FLAGS[name].value}: expected seconds, at least 0.")
    token = FLAGS.token
    if token is None:
        token = "" if FLAGS.host in _LOCAL else secrets.token_urlsafe(16)
    image, servers, speak = load_image(FLAGS.image), ice_servers(), voice()
    talk = conversation(speak) if FLAGS.talk else None
    encode = None
    if has_text_encoder(FLAGS.checkpoint):
        cache = FLAGS.prompt_cache or None
        load = functools.cache(prompt_encoder) if FLAGS.keep_text_encoder else None

        def encode(text):
            return prompt_states(FLAGS.checkpoint, text, cache=cache, load=load)

    view = PortraitView(load_settings(FLAGS.checkpoint).framing, FLAGS.face, FLAGS.frame)
    state = ServerState(
        make_pool(image), image, view, token=token, live=LiveSettings(), encode_prompt=encode,
        idle_s=FLAGS.idle_s, is_marked=FLAGS.watermark,
        speak=speak, talk=talk, ice_servers=servers,
    )  # fmt: skip
    say(
        f"compiling; then: http://{FLAGS.host}:{FLAGS.port}/" + (f"#token={token}" if token else "")
    )
    serve(state, FLAGS.host, FLAGS.port, drain_s=FLAGS.drain_s)


if __name__ == "__main__":
    cli.run_with_flags(run)

"""A portrait and a voice become a talking avatar, streamed over mesh slices.

python launch/stream.py --mesh 5
python launch/stream.py --mesh 5 --image portrait.png --audio speech.wav --out avatar.mp4
arecord -q -t raw -f S16_LE -r 16000 | python launch/stream.py --audio - --out live.mp4
"""

import contextlib
import json
import os
import sys
import time
from pathlib import Path

# More host threads than cores: collectives of many fake CPU devices must not starve each other.
os.environ.setdefault("NPROC", "16")
sys.path.insert(0, str(Path(__file__).parents[1]))

import jax
from absl import flags, logging
from ml_collections import config_flags
from tqdm import tqdm

from jax_avatar.io.audio import AudioReader, open_pipe
from jax_avatar.io.image import load_image
from jax_avatar.io.provenance import can_sign, make_signer, sign_video
from jax_avatar.io.video import VideoWriter
from jax_avatar.portraits.view import FRAMES, ShownPortrait
from jax_avatar.streaming.file import StreamReport, for_duration, stream_to_file
from jax_avatar.streaming.plan import stream_layout
from jax_avatar.streaming.prompts import prompt_states
from jax_avatar.streaming.session import AvatarSession, num_slices
from jax_avatar.weights.folder import ASSETS, DEFAULT, has_text_encoder, load_model, load_settings
from launch import cli
from launch.cli import say, warn
from launch.common import prepare_jax, prepare_portrait

flags.DEFINE_string("mesh", "5", cli.MESH)
flags.DEFINE_string("image", str(ASSETS / "portraits" / "amara.png"), "portrait")
flags.DEFINE_integer("face", None, cli.FACE, lower_bound=1)
flags.DEFINE_enum("frame", "crop", FRAMES, cli.FRAME)
flags.DEFINE_string(
    "audio", str(ASSETS / "demo.flac"), 'speech, any format; "-": standard input, a file or raw PCM'
)
flags.DEFINE_string("prompt", None, "description of the scene, for models with a prompt encoder")
flags.DEFINE_string(
    "prompt_cache",
    str(Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "jax_avatar" / "prompts"),
    "folder that keeps encoded prompts, so that the next start needs no encoder; empty: none",
)
flags.DEFINE_string("out", "avatar.mp4", "video to write: .mp4, .mov or .mkv")
flags.DEFINE_float("duration", None, "seconds: cuts the audio, or goes on in silence")
flags.DEFINE_integer("seed", 420, "of the noise", lower_bound=0, upper_bound=2**32 - 1)
flags.DEFINE_string("checkpoint", str(DEFAULT), cli.CHECKPOINT)
flags.DEFINE_enum("dtype", "", ["", "int8", "fp8"], cli.DTYPE)
flags.DEFINE_alias("weights", "dtype")  # its name until 0.1
flags.DEFINE_bool("force_sampler", False, "other levels, sampler or history than trained with")
flags.DEFINE_string("size", None, cli.STREAM_SIZE)
flags.DEFINE_integer("pcm_rate", 16000, "samples per second of raw PCM", lower_bound=1000)
flags.DEFINE_enum("pcm_format", "s16le", ["s16le", "f32le"], "of raw PCM")
flags.DEFINE_integer("pcm_channels", 1, "of raw PCM", lower_bound=1)
flags.DEFINE_bool("json", False, "print the report as one JSON line on standard output")
flags.DEFINE_bool("watermark", True, "mark every frame as generated, invisibly")
flags.DEFINE_bool("c2pa", True, "sign an mp4 or mov file, where c2pa-python is installed")
flags.DEFINE_string("c2pa_cert", None, "PEM file: certificates of the signer; made if not given")
flags.DEFINE_string("c2pa_key", None, "PEM file: private key of the first certificate")
config_flags.DEFINE_config_file("config", str(Path(__file__).parents[1] / "configs" / "stream.py"))
FLAGS = flags.FLAGS
_SHORTEST_S, _LONGEST_S = 0.001, 1e9


def open_audio(sample_rate: int, chunk: int):
    if FLAGS.audio != "-":
        return AudioReader(FLAGS.audio, sample_rate, chunk, warn=warn)
    return open_pipe(
        sys.stdin.buffer,
        sample_rate,
        chunk,
        warn=warn,
        input_rate=FLAGS.pcm_rate,
        sample_format=FLAGS.pcm_format,
        channels=FLAGS.pcm_channels,
    )


def read_prompt():
    """States of the prompt; None where there is no prompt, or nothing to read it."""
    if not has_text_encoder(FLAGS.checkpoint):
        if FLAGS.prompt:
            warn(f"{FLAGS.checkpoint} has no prompt encoder; --prompt is not used.")
        return None
    if FLAGS.prompt is None:
        warn("this model was trained with prompts; describe the scene with --prompt.")
        return None
    return prompt_states(FLAGS.checkpoint, FLAGS.prompt, cache=FLAGS.prompt_cache or None)


def open_signer():
    """Signer of the video, or None."""
    if FLAGS.c2pa and can_sign(FLAGS.out):
        return make_signer(FLAGS.c2pa_cert, FLAGS.c2pa_key)
    if FLAGS.c2pa_cert or FLAGS.c2pa_key:
        raise ValueError(
            f"--out {FLAGS.out} cannot be signed with --c2pa_cert: that takes --c2pa, an mp4 or "
            'mov file, and pip install ".[provenance]".'
        )
    return None


def check_numbers_and_output() -> None:
    """Checks that need no file opened."""
    cli.check_finite(FLAGS)
    if FLAGS.duration is not None and not _SHORTEST_S <= FLAGS.duration <= _LONGEST_S:
        raise ValueError(
            f"--duration {FLAGS.duration}: expected {_SHORTEST_S:g} to {_LONGEST_S:g} seconds."
        )
    if FLAGS.config.in_flight < 1:
        raise ValueError(f"--config.in_flight={FLAGS.config.in_flight}: expected at least 1.")
    inputs = {name: FLAGS[name].value for name in ("audio", "image", "c2pa_cert", "c2pa_key")}
    cli.refuse_input_as_output("out", FLAGS.out, **inputs, checkpoint=FLAGS.checkpoint)


@contextlib.contextmanager
def open_writer(shown: ShownPortrait, fps: int, sample_rate: int):
    """Writer of the video; reports where an older one of that name is kept, if there is any."""
    height, width = shown.size
    writer = VideoWriter(
        FLAGS.out, width, height, fps, sample_rate, show=shown.show, is_marked=FLAGS.watermark
    )
    try:
        with writer:
            yield writer
    finally:
        if writer.older:
            say(f"the video that was {FLAGS.out} before is kept as {writer.older}")


def tell(report: StreamReport, model_name: str, compile_s: float) -> None:
    first = report.time_to_first_frame_s
    say(
        f"{FLAGS.out}: {report.frames} frames, {report.video_s:.2f} s; {report.fps:.1f} FPS, "
        f"{report.real_time_factor:.2f}x real time, first frame after "
        f"{'-' if first is None else f'{first:.2f} s'} (and {compile_s:.1f} s of start-up)"
        + ("" if report.is_complete else "; stopped before the end")
    )
    if report.is_silent and report.frames:
        warn(f"{FLAGS.audio} is silent, so the face does not speak.")
    if FLAGS.json:
        device = jax.devices()[0].device_kind
        extra = {"out": FLAGS.out, "mesh": FLAGS.mesh, "model": model_name, "device": device}
        print(json.dumps(report.to_dict() | extra | {"startup_s": compile_s}))


def run() -> int:
    logging.set_verbosity(logging.WARNING)  # Orbax tells of every restore
    check_numbers_and_output()
    changes = {k: v for k, v in FLAGS.config.stream.to_dict().items() if v is not None}
    changes["force_sampler"] = FLAGS.force_sampler
    settings = load_settings(FLAGS.checkpoint, **changes)
    layout = stream_layout(settings, FLAGS.mesh)
    signer = open_signer()
    image = load_image(FLAGS.image)
    shown = prepare_portrait(
        FLAGS.image, image, FLAGS.checkpoint, settings, FLAGS.size,
        cover=settings.size is not None, face=FLAGS.face, frame=FLAGS.frame,
    )  # fmt: skip
    portrait = shown.reference
    height, width = portrait.shape[-3:-1]

    prepare_jax(num_slices(layout))
    text = read_prompt()  # first: its encoder is gone before the model comes
    model = load_model(FLAGS.checkpoint, weights=FLAGS.dtype, **changes)
    speech = model.speech.config
    chunk = 4 * model.dit.config.frames_per_block * speech.samples_per_frame
    audio = open_audio(speech.sample_rate, chunk)

    with open_writer(shown, settings.fps, speech.sample_rate) as writer:
        began = time.perf_counter()
        session = AvatarSession(
            model, portrait, layout, seed=FLAGS.seed, text=text, in_flight=FLAGS.config.in_flight
        )
        if 0 < settings.portrait_error < session.portrait_error:
            warn(
                f"{FLAGS.image} is unlike the faces {model.name} was trained on "
                f"(reconstruction error {session.portrait_error:.3f}, usual are up to "
                f"{settings.portrait_error:.3f}); the face may not hold."
            )
        say(f"{model.name}: {height}x{width} at {settings.fps} fps, --mesh {FLAGS.mesh}; compiling")
        session.warm_up()
        compile_s = time.perf_counter() - began
        wanted = None if FLAGS.duration is None else round(FLAGS.duration * speech.sample_rate)
        seconds = FLAGS.duration or audio.duration_s
        total = seconds and -(-round(seconds * speech.sample_rate) // speech.samples_per_frame)
        with tqdm(total=total, unit="frame", desc="streaming") as bar:

            def on_frames(count: int) -> None:
                bar.update(count)
                bar.set_postfix_str(f"{bar.n / settings.fps:.1f} s of video")

            report = stream_to_file(session, for_duration(audio, wanted, chunk), writer, on_frames)
        writer.close(is_whole=report.is_complete)

    if signer is not None and writer.num_frames:
        sign_video(FLAGS.out, signer)
    tell(report, model.name, compile_s)
    return cli.DONE if report.is_complete else cli.INTERRUPTED


if __name__ == "__main__":
    cli.end_by_sigterm()
    cli.run_with_flags(run, hint="no frame was made")

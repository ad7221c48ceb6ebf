"""Times of a stream, each part apart and all of it together.

    python benchmarks/stream.py --mesh 5 --out results.json
    python benchmarks/stream.py --nano --mesh 1 --seconds 5

Apart: speech encoder, each denoising step, VAE, one after another on one device, each waited for.
Together: the stream as `launch/stream.py` runs it, with all audio at hand, so that it goes as
fast as it can.
"""

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("NPROC", "16")
sys.path.insert(0, str(Path(__file__).parents[1]))

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from benchmarks.common import (
    DEMO,
    emit,
    environment,
    measure,
    open_model,
    quantiles,
    random_portrait,
    read_voice,
)
from jax_avatar.layout import parse_layout
from jax_avatar.streaming.decode import make_decode
from jax_avatar.streaming.plan import stream_layout
from jax_avatar.streaming.sampler import SequentialStream
from jax_avatar.streaming.session import AvatarSession, num_slices
from jax_avatar.weights.folder import SMALL
from launch import cli


def parse_arguments(argv=None) -> argparse.Namespace:
    parser = cli.Parser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--checkpoint", default=str(SMALL), help=cli.CHECKPOINT)
    add("--nano", dest="random", action="store_const", const="nano", help="random tiny model")
    add("--small", dest="random", action="store_const", const="small", help="random, of that shape")
    add("--mesh", default="5", help=cli.MESH)
    add("--seconds", type=float, default=20, help="of video")
    add("--repeats", type=int, default=20, help="blocks that the parts are timed on")
    add("--audio", default=str(DEMO), help="speech, repeated as often as needed")
    add("--out", default=None, help="JSON file to write")
    return parser.parse_args(argv)


def time_steps(model, session, features: np.ndarray, repeats: int) -> dict:
    """Every evaluation of a block on one device, with a full window behind it."""
    dit, plan = model.dit, session.stream.plan
    times = [[] for _ in plan.levels]
    began = 0.0

    def tap(block, step, latent):
        nonlocal began
        jax.block_until_ready(latent)
        now = time.perf_counter()
        times[step].append(now - began)
        began = now

    stream = SequentialStream(dit, plan, session.stream.conditions, tap=tap)
    # The window fills, the sink is renewed, everything compiles.
    skipped = max(dit.config.ring_blocks, plan.aas_after_blocks) + 1
    audio = jax.block_until_ready(jax.device_put(features, stream_device(stream)))
    for _ in range(skipped + repeats):
        began = time.perf_counter()
        stream.push(audio)
        if plan.refresh != "none":  # history is refreshed after the block has left
            tap(0, plan.num_steps, stream.state.windows)
    steady = [of_step[skipped:] for of_step in times]
    return {
        "step": quantiles([t for of_step in steady for t in of_step]),
        "steps": [
            {"sigma": sigma} | quantiles(of_step)
            for (sigma, _), of_step in zip(plan.levels, steady, strict=True)
        ],
        "block_of_all_steps": quantiles(np.sum(steady, axis=0)),
    }


def stream_device(stream: SequentialStream) -> jax.Device:
    """Devices that hold a stream's weights."""
    return next(iter(jax.tree.leaves(stream.params)[0].devices()))


def time_vae(model, session, repeats: int) -> dict:
    """A block's latents -> pixels on the host."""
    vae, pieces = model.vae, session.format.pieces_per_block
    params = jax.tree.map(jnp.asarray, vae.params)
    latent = jnp.repeat(jnp.asarray(session.still[:, :1]), session.format.piece_frames // 4, 1)
    start, following = make_decode(vae)
    _, state = start(params, session.portrait, latent[:, :1])

    def call():
        nonlocal state
        for _ in range(pieces):
            pixels, _, state = following(params, state, latent)
            np.asarray(pixels)

    call()
    return quantiles(measure(call, repeats))


def time_speech(model, session, voice: np.ndarray, repeats: int) -> tuple[dict, np.ndarray]:
    """A block's samples -> features on the host; and those features."""
    speech = model.speech
    start, stop = speech.config.sample_range(0, session.format.block_frames)
    params = jax.tree.map(jnp.asarray, speech.params)
    head = jnp.zeros((1, 1, max(0, start)))
    state = speech.bind(params).start(head)
    samples = np.resize(voice, stop - start)[None, None]
    features = jax.jit(lambda p, s, x: speech.bind(p).features(s, x))
    call = lambda: np.asarray(features(params, state, samples)[0])  # noqa: E731
    block = call()
    return quantiles(measure(call, repeats)), block


def time_stream(session, voice: np.ndarray, seconds: float, progress: bool = True) -> dict:
    """Streams and fetches all frames, as the launcher does but for writing a file."""
    rate, fps = session.format.sample_rate, session.format.fps
    block = session.format.block_frames * session.format.samples_per_frame
    blocks = max(session.layout.stages + 2, round(seconds * rate / block))
    samples = np.resize(voice, blocks * block)
    dispatches, pushes, arrivals = [], [], []
    given, heard = 0, None  # samples, in all and until the first block came out
    push_stream = session.stream.push

    def timed_push(features):
        nonlocal heard
        began = time.perf_counter()
        finished = push_stream(features)
        dispatches.append(time.perf_counter() - began)
        if finished and heard is None:
            heard = given
        return finished

    session.stream.push = timed_push
    frames = 0
    try:
        with tqdm(
            total=blocks * session.format.block_frames, unit="frame", disable=not progress
        ) as bar:
            for at in range(0, len(samples), block):
                given = at + block
                began = time.perf_counter()
                for part in session.push(samples[at : at + block]):
                    frames += len(part)
                    arrivals.append(time.perf_counter())
                    bar.update(len(part))
                pushes.append(time.perf_counter() - began)
            for part in session.finish():
                frames += len(part)
                arrivals.append(time.perf_counter())
                bar.update(len(part))
    finally:
        del session.stream.push  # the class's again
    times = session.times
    wall = times.last_frame - times.started
    tick = np.diff(arrivals[:-1]) if len(arrivals) > 2 else []
    return {
        "frames": frames,
        "video_s": round(frames / fps, 3),
        "wall_s": round(wall, 3),
        "fps": round(frames / wall, 2),
        "real_time_factor": round(frames / fps / wall, 3),
        "ttff_s": round(times.first_frame - times.started, 4),
        "audio_before_first_frame_s": round((heard or given) / rate, 3),
        "dispatch": quantiles(dispatches),
        "push": quantiles(pushes),
        "between_pieces": quantiles(tick),
        "block_latency": quantiles(list(times.blocks)),
    }


def run(model, mesh: str, voice, seconds: float, repeats: int = 20, progress: bool = True) -> dict:
    """All measurements of one model and layout.

    Args:
        model: from `load_model`.
        mesh: as on the command line.
        voice: samples at the speech encoder's rate.
        seconds: of video in the stream.
        repeats: blocks that the parts are timed on.
        progress: show a bar.
    """
    layout = stream_layout(model.settings, mesh)
    began = time.perf_counter()
    session = AvatarSession(model, random_portrait(model), layout)
    build = time.perf_counter() - began
    began = time.perf_counter()
    session.warm_up()
    warm_up = time.perf_counter() - began
    stream = time_stream(session, voice, seconds, progress)
    speech, features = time_speech(model, session, voice, repeats)
    steps = time_steps(model, session, features, repeats)
    vae = time_vae(model, session, repeats)
    alone = sum(part["median_ms"] for part in (speech, steps["block_of_all_steps"], vae))
    config = model.dit.config
    return {
        "model": model.name,
        "mesh": mesh,
        "dtype": str(config.dtype),
        "shapes": {
            "frame": [session.format.block_frames, *session.portrait.shape[2:]],
            "latent": [1, config.frames_per_block, *session.still.shape[2:]],
            "dit": {"width": config.width, "layers": config.num_layers, "heads": config.num_heads},
        },
        "video_fps": model.settings.fps,
        "build_s": round(build, 3),
        "warm_up_s": round(warm_up, 3),
        "parts": {"speech": speech, **steps, "vae": vae, "sum_of_medians_ms": round(alone, 3)},
        "stream": stream,
        # What a block spends waiting for its turn: nothing is waited for while it is alone.
        "queueing_ms": round(stream["block_latency"]["median_ms"] - alone, 3),
    }


def main(argv=None) -> dict:
    arguments = parse_arguments(argv)
    layout = parse_layout(arguments.mesh, 4)
    jax.config.update("jax_num_cpu_devices", num_slices(layout))
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        model = open_model(arguments.checkpoint, arguments.random, folder)
    load = time.perf_counter() - began
    voice = read_voice(arguments.audio, model.speech.config.sample_rate)
    results = run(model, arguments.mesh, voice, arguments.seconds, arguments.repeats)
    record = {"benchmark": "stream", **results, "load_s": round(load, 3), **environment()}
    return emit(record, arguments.out)


if __name__ == "__main__":
    cli.run(main)

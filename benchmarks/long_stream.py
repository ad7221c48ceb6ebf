"""Streams for hours of video and looks for growth: of memory, of time per block, of drift.

    python benchmarks/long_stream.py --out benchmarks/results/long_stream.json
    python benchmarks/long_stream.py --nano --seconds 200

Speech features -> latents for every block; the VAE decodes all of them, or only the windows that
are scored (`--decode scored`, the default), so that hours of video take minutes.
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
    open_model,
    quantiles,
    random_portrait,
    read_voice,
    resident_mib,
    slope,
)
from jax_avatar.io.image import load_image
from jax_avatar.layout import parse_layout
from jax_avatar.portraits.view import PortraitView
from jax_avatar.streaming.plan import stream_layout
from jax_avatar.streaming.session import AvatarSession, num_slices
from jax_avatar.weights.folder import SMALL
from launch import cli

# Decoded before a scored window and thrown away, so that the decoder has forgotten its start.
_CONTEXT_BLOCKS = 3
_WINDOWS = ("first", "one_third", "two_thirds", "last")


def parse_arguments(argv=None) -> argparse.Namespace:
    parser = cli.Parser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--checkpoint", default=str(SMALL), help=cli.CHECKPOINT)
    add("--nano", dest="random", action="store_const", const="nano", help="random tiny model")
    add("--small", dest="random", action="store_const", const="small", help="random, of that shape")
    add("--seconds", type=float, default=10_000, help="of video")
    add("--window", type=float, default=20, help="seconds of video in a scored window")
    add("--decode", choices=("scored", "all"), default="scored", help="blocks that are decoded")
    add("--mesh", default="1", help=cli.MESH)
    add("--image", default=None, help="portrait; a random picture for random models")
    add("--audio", default=str(DEMO), help="speech, repeated without end")
    add("--seed", type=int, default=420, help="of the noise")
    add("--out", default=None, help="JSON file to write")
    return parser.parse_args(argv)


def window_starts(blocks: int, size: int) -> list[int]:
    """First blocks of the four scored windows."""
    last = blocks - size
    return [round(last * part) for part in (0, 1 / 3, 2 / 3, 1)]


def speech_features(model, voice: np.ndarray):
    """Yields the features of block after block of a voice that repeats, as a stream makes them."""
    speech, frames = model.speech, 4 * model.dit.config.frames_per_block
    start, stop = speech.config.sample_range(0, frames)
    head, count = max(0, start), stop - start
    network = speech.bind()
    features = jax.jit(lambda params, state, samples: speech.bind(params).features(state, samples))
    at = head
    state = network.start(jnp.asarray(voice[None, None, :head]))
    while True:
        samples = voice[np.arange(at, at + count) % len(voice)]
        block, state = features(speech.params, state, samples[None, None])
        yield np.array(block)
        at = (at + count) % len(voice)


class Decoder:
    """Latents of a run of blocks -> frames in [-1, 1]."""

    def __init__(self, session):
        vae, self._portrait = session.model.vae, session.portrait
        self._params = jax.tree.map(jnp.asarray, vae.params)
        self._start = jax.jit(lambda p, portrait, x: vae.bind(p).start(portrait, x)[1])
        self._next = jax.jit(lambda p, s, x: vae.bind(p).decode_next(s, x))
        self._state = None

    def restart(self) -> None:
        """Forgets what came before."""
        self._state = None

    def __call__(self, latent) -> np.ndarray:
        """Frames of the next block, `[T H W 3]`."""
        latent = jnp.asarray(latent)
        if self._state is None:
            self._state = self._start(self._params, self._portrait, latent[:, :1])
        video, self._state = self._next(self._params, self._state, latent)
        return np.clip(np.asarray(video)[0], -1, 1)


def block_scores(latent: np.ndarray, video: np.ndarray) -> dict[str, np.ndarray]:
    """Statistics of a block in which drift shows: contrast, colour, sharpness, motion."""
    edges = np.abs(np.diff(video, axis=1)).mean() + np.abs(np.diff(video, axis=2)).mean()
    return {
        "latent_mean": latent.mean(),
        "latent_std": latent.std(),
        "latent_max": np.abs(latent).max(),
        "colour_mean": video.mean((0, 1, 2)),
        "colour_std": video.std((0, 1, 2)),
        "sharpness": edges,
        "motion": np.abs(np.diff(video, axis=0)).mean(),
    }


def mean_scores(scores: list[dict[str, np.ndarray]]) -> dict:
    """The scores of a window, averaged over its blocks."""
    mean = {name: np.mean([s[name] for s in scores], axis=0) for name in scores[0]}
    return {name: np.round(value.astype(np.float64), 5).tolist() for name, value in mean.items()}


class Scorer:
    """Statistics of all blocks of a stream, and scores of those in its windows.

    Attributes:
        starts: first blocks of the windows.
        size: blocks of a window.
        scores: of the blocks of each window.
        means, stds: of every block's latents.
        finite: whether all latents are.
    """

    def __init__(self, session, blocks: int, size: int, decode_all: bool):
        self.starts, self.size = window_starts(blocks, size), size
        self.scores = [[] for _ in self.starts]
        # Filled in place: a list that grows would look like a leak.
        self.means, self.stds = np.zeros(blocks), np.zeros(blocks)
        self.finite = True
        self._decoder, self._decode_all, self._number = Decoder(session), decode_all, 0

    def take(self, latent) -> None:
        """Scores a finished block."""
        number, value = self._number, np.array(latent[0], np.float32)
        self.finite = self.finite and bool(np.isfinite(value).all())
        self.means[number], self.stds[number] = value.mean(), value.std()
        first = [max(0, start - _CONTEXT_BLOCKS) for start in self.starts]
        near = any(a <= number < s + self.size for a, s in zip(first, self.starts, strict=True))
        if self._decode_all or near:
            if not self._decode_all and number in first:
                self._decoder.restart()
            video = self._decoder(latent)
            for start, scores in zip(self.starts, self.scores, strict=True):
                if start <= number < start + self.size:
                    scores.append(block_scores(value, video))
        self._number += 1


def run(session, features, seconds: float, window: float, decode_all: bool, progress=True) -> dict:
    """Streams and measures.

    Args:
        session: warmed up; its stream is used, its loop is not.
        features: endless iterator of speech features, a block each.
        seconds: of video.
        window: seconds of video in each of the four scored windows.
        decode_all: decode every block, not only those that are scored.
        progress: show a bar.
    """
    stream, block_s = session.stream, session.format.block_s
    blocks = max(20, round(seconds / block_s))
    size = max(1, min(round(window / block_s), blocks // 4))
    scorer = Scorer(session, blocks, size, decode_all)
    wall, cpu = np.zeros(blocks), np.zeros(blocks)
    every = max(1, blocks // 1000)
    memory = np.zeros((-(-blocks // every), 2))
    arrays = []
    stream.reset()
    began = time.perf_counter()
    for block in tqdm(range(blocks), unit="block", disable=not progress, mininterval=2):
        audio = next(features)
        clock, cpu_clock = time.perf_counter(), time.process_time()
        finished = jax.block_until_ready(stream.push(audio))
        wall[block] = time.perf_counter() - clock
        cpu[block] = time.process_time() - cpu_clock
        for latent in finished:
            scorer.take(latent)
        del finished
        if block % every == 0:
            memory[block // every] = block, resident_mib()
        if block in (blocks // 10, blocks - 1):
            arrays.append(len(jax.live_arrays()))
    for latent in stream.finish():
        scorer.take(latent)
    elapsed = time.perf_counter() - began
    return {
        "video_s": round(blocks * block_s, 2),
        "blocks": blocks,
        "elapsed_s": round(elapsed, 1),
        "real_time_factor": round(blocks * block_s / elapsed, 2),
        "finite": scorer.finite,
        "memory": memory_report(memory, blocks, arrays),
        "block_latency": tenths(wall),
        "block_cpu_time": tenths(cpu, least_ms=1e-6),
        "drift": drift(scorer, block_s),
    }


def memory_report(memory: np.ndarray, blocks: int, arrays: list[int]) -> dict:
    """Growth of memory after the first tenth, over rows of block and MiB; arrays alive."""
    warm = [(b, m) for b, m in memory if b >= blocks // 10]
    return {
        "first_mib": round(warm[0][1], 2),
        "last_mib": round(warm[-1][1], 2),
        "slope_mib_per_1000_blocks": round(1000 * slope(*zip(*warm, strict=True)), 4),
        "samples": len(warm),
        "tenths_mib": [round(float(m), 1) for _, m in memory[:: max(1, len(memory) // 10)]],
        "live_arrays_after_a_tenth": arrays[0],
        "live_arrays_at_the_end": arrays[1],
    }


def tenths(seconds: np.ndarray, least_ms: float = 0.0) -> dict:
    """Times of the first and the last tenth of the blocks, and their ratio."""
    tenth = max(1, len(seconds) // 10)
    ends = {"first_tenth": slice(tenth // 5, tenth), "last_tenth": slice(-tenth, None)}
    found = {name: quantiles(seconds[part]) for name, part in ends.items()}
    first = max(found["first_tenth"]["median_ms"], least_ms)
    return found | {"last_over_first": round(found["last_tenth"]["median_ms"] / first, 3)}


def drift(scorer: Scorer, block_s: float) -> dict:
    """Scores of the windows, and slopes of the latents' statistics."""
    video_ks = np.arange(len(scorer.means)) * block_s / 1000
    return {
        "window_s": scorer.size * block_s,
        "windows": {
            name: {"start_s": start * block_s} | mean_scores(scores)
            for name, start, scores in zip(_WINDOWS, scorer.starts, scorer.scores, strict=True)
        },
        "latent_mean_slope_per_1000_s": round(slope(video_ks, scorer.means), 6),
        "latent_std_slope_per_1000_s": round(slope(video_ks, scorer.stds), 6),
    }


def main(argv=None) -> dict:
    arguments = parse_arguments(argv)
    with tempfile.TemporaryDirectory() as folder:
        # Devices are counted before JAX makes them; nothing is loaded yet.
        layout = parse_layout(arguments.mesh, 4)
        jax.config.update("jax_num_cpu_devices", num_slices(layout))
        model = open_model(arguments.checkpoint, arguments.random, folder)
    layout = stream_layout(model.settings, arguments.mesh)
    if arguments.image:
        size = model.settings.size or (384, 704)
        view = PortraitView(model.settings.framing)
        portrait = view.portrait(load_image(arguments.image), size).reference
    else:
        portrait = random_portrait(model)
    session = AvatarSession(model, portrait, layout, seed=arguments.seed)
    features = speech_features(model, read_voice(arguments.audio, session.format.sample_rate))
    began = time.perf_counter()
    for _ in range(max(model.settings.aas_after_blocks, layout.stages) + 2):
        jax.block_until_ready(session.stream.push(next(features)))
    session.stream.finish()
    compile_s = time.perf_counter() - began
    results = run(session, features, arguments.seconds, arguments.window, arguments.decode == "all")
    record = {
        "benchmark": "long_stream",
        "model": model.name,
        "mesh": arguments.mesh,
        "latent": list(session.still[:, :1].shape),
        "dtype": str(model.dit.config.dtype),
        "decode": arguments.decode,
        "audio": Path(arguments.audio).name,
        "warm_up_s": round(compile_s, 2),
        **results,
        **environment(),
    }
    return emit(record, arguments.out)


if __name__ == "__main__":
    cli.run(main)

"""Speed of a pipeline of two slices against the same work in sequence, one core per device.

    python benchmarks/overlap.py
    python benchmarks/overlap.py --width 384 --layers 8 --blocks 24

Two processes, each with one core and one thread of mathematics per device:

    sequential   `SequentialStream`, one device on one core      steps 0 1 2 3, block after block
    pipelined    `PipelinedStream --mesh 2`, two devices on two  steps 0 1 | steps 2 3

They run in turn, never together, several rounds of the same blocks. The ratio says how much of
the second core the pipeline turns into speed. It needs an idle machine: where other programs take
turns on the cores, `cores_used` falls below 1 and 2 and the rounds disagree.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

os.environ.setdefault("NPROC", "16")
sys.path.insert(0, str(Path(__file__).parents[1]))

import jax
import numpy as np
from flax import nnx

from benchmarks.common import emit, environment, random_weights
from jax_avatar.layout import make_mesh, parse_layout
from jax_avatar.models.conditions import Conditions
from jax_avatar.models.config import DiTConfig
from jax_avatar.models.dit import DiT
from jax_avatar.models.network import Network
from jax_avatar.streaming.pipeline import PipelinedStream
from jax_avatar.streaming.plan import StreamPlan
from jax_avatar.streaming.sampler import SequentialStream
from jax_avatar.testing import NANO
from launch import cli

CORES = {"sequential": 1, "pipelined": 2}


def parse_arguments(argv=None) -> argparse.Namespace:
    parser = cli.Parser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--width", type=int, default=256, help="of the transformer; heads of 64 channels")
    add("--layers", type=int, default=6, help="of the transformer")
    add("--grid", type=int, default=12, help="latent rows and columns")
    add("--blocks", type=int, default=16, help="per round")
    add("--rounds", type=int, default=5, help="of each kind")
    add("--out", default=None, help="JSON file to write")
    add("--worker", choices=CORES, default=None, help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def mid_size(width: int, layers: int) -> DiTConfig:
    """A transformer large enough that a step outweighs its dispatch."""
    heads = max(1, width // 64)
    size = {"width": width, "ffn_width": 4 * width, "num_heads": heads, "num_layers": layers}
    return NANO.replace(**size, framepack=False, audio_history=1)


def make_stream(kind: str, config: DiTConfig, grid: int):
    """A stream of random weights, four steps."""
    build = lambda: DiT(config, rngs=nnx.Rngs(0))  # noqa: E731
    params = random_weights(build)
    kernel = params["head"]["kernel"]
    params["head"]["kernel"] = 0.1 * jax.random.normal(jax.random.key(0), kernel.shape)
    latent = (1, 1, grid, grid, config.latent_channels)
    pose = (1, config.frames_per_block, grid, grid, config.pose_channels)
    draw = np.random.default_rng(0).standard_normal
    text = draw((1, 2, config.text_width), np.float32)
    conditions = Conditions(
        text=text, reference=draw(latent, np.float32), pose=draw(pose, np.float32)
    )
    network = Network.abstract(DiT, config).with_params(params)
    arguments = (network, StreamPlan(), conditions)
    if kind == "sequential":
        return SequentialStream(*arguments)
    mesh, _ = make_mesh(parse_layout("2", 4))
    return PipelinedStream(*arguments, mesh)


def one_round(stream, blocks: int) -> dict[str, float]:
    """Wall and processor seconds of some blocks from the start, and what came out."""
    config = stream.config
    shape = (1, 1, 4 * config.frames_per_block, config.audio_layers, config.audio_width)
    audio = np.random.default_rng(1).standard_normal(shape, np.float32)
    stream.reset()
    jax.block_until_ready(stream.conditions)
    began, cpu_began = time.perf_counter(), time.process_time()
    latents = []
    for _ in range(blocks):
        latents += stream.push(audio)
        # Ticks in flight are bounded, as in a session.
        jax.block_until_ready(latents[-2:-1])
    latents += stream.finish()
    jax.block_until_ready(latents)
    assert len(latents) == blocks
    return {
        "wall_s": time.perf_counter() - began,
        "cpu_s": time.process_time() - cpu_began,
        "checksum": float(np.mean(np.abs(np.asarray(latents[-1], np.float32)))),
    }


def summary(rounds: dict[str, list[dict[str, float]]], blocks: int) -> dict:
    """Medians of both kinds, and the ratio of rounds that followed one another."""
    results = {}
    for kind in CORES:
        wall = [r["wall_s"] for r in rounds[kind]]
        cores = [r["cpu_s"] / r["wall_s"] for r in rounds[kind]]
        results[kind] = {
            "median_s": round(float(np.median(wall)), 4),
            "p95_s": round(float(np.percentile(wall, 95)), 4),
            "block_ms": round(1000 * float(np.median(wall)) / blocks, 2),
            "cpu_s": round(float(np.median([r["cpu_s"] for r in rounds[kind]])), 4),
            "cores_used": round(float(np.median(cores)), 2),
            "rounds_s": [round(w, 4) for w in wall],
        }
    pairs = zip(rounds["sequential"], rounds["pipelined"], strict=True)
    ratios = [a["wall_s"] / b["wall_s"] for a, b in pairs]
    first, second = (rounds[kind][0]["checksum"] for kind in CORES)
    return results | {
        "ratio": round(float(np.median(ratios)), 3),
        "ratios": [round(r, 3) for r in ratios],
        "same_latents": bool(np.isclose(first, second, rtol=1e-3)),
        # A pipeline of two needs one more half block to fill.
        "ideal_ratio": round(2 * blocks / (blocks + 1), 3),
    }


def work(arguments: argparse.Namespace) -> None:
    """Answers every line on standard input with a round; the first answer comes unasked."""
    kind = arguments.worker
    if hasattr(os, "sched_setaffinity"):
        # Before the first use of JAX, whose threads inherit it.
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: CORES[kind]])
    jax.config.update("jax_num_cpu_devices", CORES[kind])
    stream = make_stream(kind, mid_size(arguments.width, arguments.layers), arguments.grid)
    one_round(stream, 8)  # compiles, the renewal of the sink included
    print(json.dumps(environment()), flush=True)
    for _ in sys.stdin:
        print(json.dumps(one_round(stream, arguments.blocks)), flush=True)


def run(arguments: argparse.Namespace) -> dict:
    """Rounds of both kinds in processes of their own, in turn."""
    sizes = [f"--{n}={getattr(arguments, n)}" for n in ("width", "layers", "grid", "blocks")]
    workers, rounds, surroundings = {}, {kind: [] for kind in CORES}, {}
    one_thread = f"{os.environ.get('XLA_FLAGS', '')} --xla_cpu_multi_thread_eigen=false".strip()
    try:
        for kind in CORES:
            workers[kind] = subprocess.Popen(
                [sys.executable, __file__, "--worker", kind, *sizes],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                env=os.environ | {"XLA_FLAGS": one_thread},
            )
            surroundings[kind] = _answer(workers[kind], kind)
        for _ in range(arguments.rounds):
            for kind, worker in workers.items():
                worker.stdin.write("go\n")
                worker.stdin.flush()
                rounds[kind].append(_answer(worker, kind))
    finally:
        for worker in workers.values():
            worker.stdin.close()
            worker.wait(timeout=60)
    counts = {kind: {k: s[k] for k in ("devices", "cpus")} for kind, s in surroundings.items()}
    return summary(rounds, arguments.blocks) | {"workers": counts}


def _answer(worker: subprocess.Popen, kind: str) -> dict:
    line = worker.stdout.readline()
    if not line:
        raise ValueError(f"the {kind} run ended early; its message stands above.")
    return json.loads(line)


def main(argv=None) -> dict | None:
    arguments = parse_arguments(argv)
    if arguments.worker:
        return work(arguments)
    config = mid_size(arguments.width, arguments.layers)
    record = {
        "benchmark": "overlap",
        "blocks": arguments.blocks,
        "dtype": str(config.dtype),
        "latent": [1, config.frames_per_block, arguments.grid, arguments.grid],
        "dit": {"width": config.width, "layers": config.num_layers, "heads": config.num_heads},
        **run(arguments),
        **environment(),
    }
    return emit(record, arguments.out)


if __name__ == "__main__":
    cli.run(main)

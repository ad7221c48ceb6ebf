"""Training windows per second, made by the training process or by workers.

    python benchmarks/loader.py
    python benchmarks/loader.py --size paper --batches 8
    python benchmarks/loader.py --data data/latents --latents 9 --batch 64

One run reads the same batches with 0, 1 and 2 processes (`loop.workers`), each for so many batches
after the first `--warm_up`, and prints windows per second, their ratio to 0 processes, and the CPU
time of the training process per window, which is what the loader takes from the steps. Without
`--data`, noise is encoded as clips of three seconds at 96x96 ("small") or ten at 384x704 ("paper").
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import jax
import ml_dtypes
import numpy as np
from absl import flags

from benchmarks.common import emit, environment
from jax_avatar.data.encoded import EncodedClip, encode_encoded, finish_index, start_index
from jax_avatar.data.latents import load_encoded
from jax_avatar.data.shards import write_records
from jax_avatar.data.windows import Windows
from jax_avatar.training.run.loader import load_batches
from launch import cli

__all__ = ["main", "run", "write_noise"]

# Latents of a clip, grid, channels, states and channels of the speech features, fps, window.
_SIZES = {
    "nano": (4, (2, 2), 4, (2, 6), 16, 3),
    "small": (13, (12, 12), 32, (5, 96), 16, 9),
    "paper": (40, (48, 88), 16, (25, 1024), 16, 21),
}


def write_noise(folder: Path, size: str, count: int) -> None:
    """Writes an encoded data set of noise."""
    latents, grid, channels, states, fps, _ = _SIZES[size]
    frames, rng = 4 * (latents - 1) + 1, np.random.default_rng(0)

    def noise(*shape):
        return rng.standard_normal(shape, np.float32).astype(ml_dtypes.bfloat16)

    def clip(number):
        return EncodedClip(
            latent=noise(latents, *grid, channels),
            reference=noise(1, *grid, channels),
            wave=np.zeros(frames * 16_000 // fps + 1280, np.int16),
            text=None,
            features=noise(frames, *states),
            mouth=None,
            lip_gap=None,
            reference_frames=(-1,),
            first_frame=0,
            caption="",
            actions=(),
            fps=fps,
            person=number,
            source=f"noise {number}",
        )

    start_index(folder, {"weights": {}})
    path = folder / "train-00000-of-00001.array_record"
    write_records(path, (encode_encoded(clip(number)) for number in range(count)))
    finish_index(folder, {"train": [path]})


def run(windows: Windows, workers: Sequence[int], batches: int, warm_up: int) -> list[dict]:
    """One row per number of processes."""
    rows = []
    for number in workers:
        ahead = load_batches(windows.batch, jax.device_put, 0, batches + warm_up, workers=number)
        for step, batch in ahead:
            jax.block_until_ready(batch)
            if step + 1 == warm_up:
                began, cpu = time.perf_counter(), time.process_time()
        seconds, cpu = time.perf_counter() - began, time.process_time() - cpu
        count = batches * windows.order.batch_size
        rows.append(
            {
                "workers": number,
                "windows_per_s": round(count / seconds, 1),
                "own_cpu_ms_per_window": round(1000 * cpu / count, 3),
            }
        )
        rows[-1]["ratio"] = round(rows[-1]["windows_per_s"] / rows[0]["windows_per_s"], 2)
    return rows


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    parser = cli.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="folder of encoded clips; noise if not given")
    parser.add_argument(
        "--shape", "--size", choices=_SIZES, default="small", help="of the noise (--size until 0.1)"
    )
    parser.add_argument("--clips", type=int, default=64, help="of noise")
    parser.add_argument("--latents", type=int, help="of a window; that of the size if not given")
    parser.add_argument("--batch", type=int, default=16, help="windows of a batch")
    parser.add_argument("--batches", type=int, default=40, help="to measure")
    parser.add_argument("--warm_up", type=int, default=8, help="batches before that")
    parser.add_argument("--workers", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--out", help="JSON file to write, too")
    options = parser.parse_args(argv)
    flags.FLAGS.mark_as_parsed()  # for grain
    with tempfile.TemporaryDirectory() as folder:
        if not options.data:
            write_noise(Path(folder), options.shape, options.clips)
        clips = load_encoded(options.data or folder, "train")
        latents = options.latents or _SIZES[options.shape][-1]
        windows = Windows(clips, latents, options.batch)
        rows = run(windows, options.workers, options.batches, options.warm_up)
        shape = {"latents": latents, "grid": list(clips.grid), "channels": clips.channels}
    return emit(
        {
            "benchmark": "loader",
            **environment(),
            **shape,
            "batch": options.batch,
            "batches": options.batches,
            "rows": rows,
        },
        options.out,
    )


if __name__ == "__main__":
    cli.run(main)

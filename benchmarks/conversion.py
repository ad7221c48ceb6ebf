"""Converts a synthetic download of the 14B's names and proportions, and measures peak memory.

    python benchmarks/conversion.py --gb 6.6
    python benchmarks/conversion.py --gb 32.6 --folder /somewhere/large

Writes a sharded transformer with all 1260 official names, 40 layers, and the width that gives the
wanted size; converts it in a process of its own; exports it again and compares every bit.
"""

import argparse
import json
import shutil
import struct
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import ml_dtypes
import numpy as np
from tqdm import tqdm

from benchmarks.common import emit, environment
from benchmarks.device import official_shapes
from conversion.readers import open_weights
from conversion.wan_dit import TABLE
from jax_avatar.models.config import DiTConfig, wan_s2v_14b
from jax_avatar.models.dit import DiT
from jax_avatar.models.network import Network, flatten
from launch import cli

_SHARDS = 4


def parse_arguments(argv=None) -> argparse.Namespace:
    parser = cli.Parser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--gb", type=float, default=6.6, help="size of the download; the published one has 32.6")
    add("--folder", type=Path, default=None, help="where to work; twice --gb and more is needed")
    add("--out", default=None, help="JSON file to write")
    return parser.parse_args(argv)


def config_of(gigabytes: float) -> DiTConfig:
    """The published transformer at another width, in its proportions."""
    published = wan_s2v_14b()
    heads = max(1, round(published.num_heads * (gigabytes / 32.6) ** 0.5))
    width = heads * published.head_dim
    ffn = published.ffn_width * width // published.width // 2 * 2
    return published.replace(width=width, ffn_width=ffn, num_heads=heads)


def official_config(config: DiTConfig) -> dict:
    """Content of the download's `config.json`."""
    return {
        "model_type": "s2v",
        "dim": config.width,
        "ffn_dim": config.ffn_width,
        "num_heads": config.num_heads,
        "num_layers": config.num_layers,
        "audio_inject_layers": list(config.audio_inject_layers),
        "audio_dim": config.audio_width,
        "num_audio_token": config.num_audio_tokens,
    }


def write_download(folder: Path, config: DiTConfig) -> int:
    """Random bfloat16 weights under the official names; returns the bytes."""
    folder.mkdir(parents=True)
    leaves = flatten(Network.abstract(DiT, config).params)
    shapes = official_shapes(leaves, TABLE)
    draw = np.random.default_rng(0)
    # Drawing 14 billion numbers would take longer than everything else.
    pool = (0.02 * draw.standard_normal(1 << 25, np.float32)).astype(ml_dtypes.bfloat16)
    pool = np.concatenate([pool, pool])
    names, places, total = sorted(shapes), {}, 0
    for i in range(_SHARDS):
        file = f"diffusion_pytorch_model-{i + 1:05}-of-{_SHARDS:05}.safetensors"
        part = {name: shapes[name] for name in names[i::_SHARDS]}
        header, place = {}, 0
        for name, shape in part.items():
            size = 2 * int(np.prod(shape))
            header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [place, place + size]}
            place += size
        text = json.dumps(header).encode()
        with open(folder / file, "wb") as output:
            output.write(struct.pack("<Q", len(text)) + text)
            for shape in tqdm(part.values(), desc=file):
                count, start = int(np.prod(shape)), int(draw.integers(1 << 25))
                while count:
                    piece = min(count, 1 << 25)
                    output.write(pool[start : start + piece].view(np.uint8).data)
                    count -= piece
        places |= dict.fromkeys(part, file)
        total += place
    index = folder / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": places}))
    (folder / "config.json").write_text(json.dumps(official_config(config)))
    return total


def run_measured(command: list[str]) -> dict:
    """Runs a command; peak of its own memory, and of it with the mapped files it has touched."""
    began = time.perf_counter()
    process = subprocess.Popen(command, cwd=Path(__file__).parents[1])
    peaks = {"RssAnon": 0, "VmHWM": 0}

    def watch():
        while process.poll() is None:
            try:
                status = Path(f"/proc/{process.pid}/status").read_text()
            except OSError:
                return
            for line in status.splitlines():
                name, _, value = line.partition(":")
                if name in peaks:
                    peaks[name] = max(peaks[name], int(value.split()[0]) * 1024)
            time.sleep(0.02)

    watcher = threading.Thread(target=watch)
    watcher.start()
    code = process.wait()
    watcher.join()
    if code:
        raise ValueError(f"{' '.join(command)} ended with exit code {code}.")
    return {
        "seconds": round(time.perf_counter() - began, 1),
        "peak_own_gb": round(peaks["RssAnon"] / 1e9, 3),
        "peak_with_mapped_files_gb": round(peaks["VmHWM"] / 1e9, 3),
    }


def same_bits(first: Path, second: Path) -> bool:
    a, b = (
        open_weights(folder / "diffusion_pytorch_model.safetensors.index.json")
        for folder in (first, second)
    )
    return set(a) == set(b) and all(
        np.array_equal(np.asarray(a[n]).view(np.uint16), np.asarray(b[n]).view(np.uint16))
        for n in tqdm(a, desc="compare")
    )


def main(argv=None) -> dict:
    arguments = parse_arguments(argv)
    folder = Path(tempfile.mkdtemp(prefix="conversion-", dir=arguments.folder))
    try:
        config = config_of(arguments.gb)
        size = write_download(folder / "download", config)
        python = [sys.executable, "-m"]
        source, model, back = folder / "download", folder / "model", folder / "back"
        converted = run_measured(
            [*python, "conversion.convert", "wan_s2v", "--src", str(source), "--out", str(model)]
        )
        exported = run_measured(
            [
                *python,
                "conversion.export",
                str(model / "dit"),
                "--out",
                str(back),
                "--shard-gb",
                "2",
            ]
        )
        record = {
            "benchmark": "conversion",
            "download_gb": round(size / 1e9, 3),
            "dit": {"width": config.width, "layers": config.num_layers},
            "convert": converted,
            "export": exported,
            "same_bits": same_bits(source, back),
            **environment(),
        }
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return emit(record, arguments.out)


if __name__ == "__main__":
    cli.run(main)

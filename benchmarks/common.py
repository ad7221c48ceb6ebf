"""Helpers of the benchmarks: environment, statistics of times, random models, a voice."""

import json
import os
import platform
import resource
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from jax_avatar.io.audio import AudioReader
from jax_avatar.models.network import Network
from jax_avatar.models.portrait_dit import PortraitDiT
from jax_avatar.models.speech.mel import SpeechConfig
from jax_avatar.models.vae.light import LightVAEConfig
from jax_avatar.testing import NANO, make_network, save_model, save_networks
from jax_avatar.weights.folder import SMALL, AvatarModel, load_model

__all__ = [
    "SMALL_CONFIG",
    "emit",
    "environment",
    "measure",
    "open_model",
    "quantiles",
    "random_portrait",
    "random_weights",
    "read_voice",
    "resident_mib",
    "robust_slope",
    "save_random_model",
    "slope",
]

ROOT = Path(__file__).parents[1]
DEMO = SMALL.parent / "demo.flac"

SMALL_CONFIG = NANO.replace(
    audio_history=1,
    framepack=False,
    width=192,
    ffn_width=768,
    num_heads=4,
    num_layers=6,
    freq_width=256,
    text_width=32,
    text_len=8,
    latent_channels=32,
    pose_channels=32,
    audio_width=96,
    audio_layers=5,
    num_audio_tokens=4,
    audio_inject_layers=(0, 2, 4),
    ring_blocks=3,
    unroll=6,
)
"""The shape of the small model, for times without its weights."""


def environment(**more: Any) -> dict[str, Any]:
    """Environment of a measurement: command, commit, device, versions."""
    device = jax.devices()[0]
    names = ("jax", "jaxlib", "flax", "numpy")
    return {
        "command": " ".join(["python", *map(shlex.quote, _relative(sys.argv))]),
        "commit": _commit(),
        "device": device.device_kind,
        "platform": device.platform,
        "devices": jax.device_count(),
        "processor": _processor(),
        "cpus": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
        "load_1min": round(os.getloadavg()[0], 1),
        "versions": {"python": platform.python_version()}
        | {name: metadata.version(name) for name in names},
        **more,
    }


def _relative(arguments: Sequence[str]) -> list[str]:
    script = Path(arguments[0])
    if script.is_absolute() and script.is_relative_to(ROOT):
        script = script.relative_to(ROOT)
    return [str(script), *arguments[1:]]


def _commit() -> str | None:
    """The commit, with a plus if what is measured differs from it; None outside a checkout."""

    def git(*arguments):
        command = ["git", "-C", str(ROOT), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        changed = git(
            "status", "--porcelain", "--untracked-files=no", "--", "jax_avatar", "benchmarks"
        )
        return git("rev-parse", "--short=12", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def emit(record: dict[str, Any], out: str | Path | None = None) -> dict[str, Any]:
    """Prints a record as one JSON line, and writes it indented to a file if one is given."""
    print(json.dumps(record), flush=True)
    if out:
        Path(out).parent.mkdir(parents=True, exist_ok=True)
        Path(out).write_text(json.dumps(record, indent=2) + "\n")
    return record


def quantiles(seconds: Sequence[float], digits: int = 3) -> dict[str, float | int | None]:
    """Median and 95th percentile of times, in milliseconds."""
    if not len(seconds):
        return {"median_ms": None, "p95_ms": None, "count": 0}
    ms = 1000 * np.asarray(seconds, np.float64)
    median, p95 = np.percentile(ms, [50, 95])
    return {
        "median_ms": round(float(median), digits),
        "p95_ms": round(float(p95), digits),
        "count": len(ms),
    }


def measure(function: Callable[[], Any], repeats: int) -> list[float]:
    """Seconds of each call, until its result is there; the first call is the caller's."""
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        jax.block_until_ready(function())
        times.append(time.perf_counter() - began)
    return times


def slope(x: Sequence[float], y: Sequence[float]) -> float:
    """Least-squares slope of `y` over `x`."""
    return float(np.polyfit(np.asarray(x, np.float64), np.asarray(y, np.float64), 1)[0])


def robust_slope(x: Sequence[float], y: Sequence[float], parts: int = 200) -> float:
    """Median slope between any two of at most `parts` medians: jumps hardly move it.

    Source: Sen, "Estimates of the regression coefficient based on Kendall's tau", 1968.
    """
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    points = [
        (np.median(x[part]), np.median(y[part]))
        for part in np.array_split(np.arange(len(x)), min(parts, len(x)))
    ]
    x, y = np.array(points).T
    first, second = np.triu_indices(len(x), 1)
    return float(np.median((y[second] - y[first]) / (x[second] - x[first])))


def resident_mib() -> float:
    """Memory of this process that is in RAM; the peak where the system reports no more."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages * resource.getpagesize() / 2**20
    except OSError:
        unit = 2**20 if sys.platform == "darwin" else 2**10
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def open_model(checkpoint: str | Path | None, random: str | None, folder: str | Path):
    """The model to measure: weights from a folder, or random ones made in `folder`.

    Raises:
        ValueError: there are no weights in `checkpoint`.
    """
    if random:
        return load_model(save_random_model(folder, random))
    checkpoint = Path(checkpoint or SMALL)
    if not (checkpoint / "config.json").is_file():
        raise ValueError(
            f"{checkpoint} holds no model; pass --checkpoint FOLDER, or --nano or --small for "
            "random weights."
        )
    return load_model(checkpoint)


def save_random_model(folder: str | Path, size: str = "nano") -> Path:
    """Writes a model folder of random weights: "nano" 64x64, or the shape of "small" 96x96."""
    if size not in ("nano", "small"):
        raise ValueError(f"random model {size!r} is unknown; nano or small are known.")
    if size == "nano":
        return save_model(folder, name="random-nano")
    stream = {
        "fps": 16,
        "size": [96, 96],
        "sigmas": [1.0, 0.9, 0.75, 0.5, 0.0],
        "pose": "reference",
        "warmup_latents": 2,
    }
    dit = make_network(SMALL_CONFIG, kind=PortraitDiT)
    networks = (dit, SpeechConfig(), LightVAEConfig())
    return save_networks(folder, "random-small", *networks, stream, kind="portrait")


def random_weights(build: Callable[[], nnx.Module]) -> dict[str, Any]:
    """Parameters of a new module, as one compiled function."""
    return jax.jit(lambda: Network.of(build()).params)()


def random_portrait(model: AvatarModel, seed: int = 0) -> np.ndarray:
    """A smooth picture in [-1, 1], `[1 1 H W 3]`."""
    height, width = model.settings.size or (384, 704)
    coarse = np.random.default_rng(seed).uniform(-1, 1, (4, 4, 3))
    fine = np.kron(coarse, np.ones((-(-height // 4), -(-width // 4), 1)))
    return fine[None, None, :height, :width].astype(np.float32)


def read_voice(path: str | Path, sample_rate: int) -> np.ndarray:
    """All samples of an audio file."""
    return np.concatenate(list(AudioReader(path, sample_rate, sample_rate)))

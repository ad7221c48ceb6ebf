"""One streaming step of a transformer of random weights: time, arithmetic, memory.

    python benchmarks/dit_step.py                              14B, one device with 60 GB
    python benchmarks/dit_step.py --attention xla --dtype fp8
    python benchmarks/dit_step.py --layers 8 --size 720*400
    python benchmarks/dit_step.py --tiny                       seconds, on any CPU

The window is full, as it is from the fifth block of a stream on. Weights are made on the device
in the type they are stored in, so that nothing is read, sent or converted. The prompt's keys and
values are always cached: they are part of the sink.
"""

import argparse
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.common import SMALL_CONFIG, emit, environment, measure, quantiles
from benchmarks.device import (
    custom_calls,
    latent_grid,
    memory_use,
    random_params,
    share_of_peak,
    speed,
    weight_bytes,
)
from jax_avatar.models.attention import choose_kernel
from jax_avatar.models.cache import KVCache, Sink, empty_cache
from jax_avatar.models.conditions import Conditions
from jax_avatar.models.config import ATTENTION_KERNELS, DiTConfig, wan_s2v_14b
from jax_avatar.models.dit import DiT
from jax_avatar.models.network import Network
from jax_avatar.models.portrait_dit import PortraitDiT
from jax_avatar.models.sharding import kv_sharding
from jax_avatar.planning.stream import compute_bound, step_flops
from jax_avatar.streaming.plan import StreamPlan
from jax_avatar.streaming.sampler import make_prefill, make_step
from jax_avatar.testing import NANO
from launch import cli

CONFIGS: dict[str, tuple[Callable, Callable[[], DiTConfig], str]] = {
    "nano": (DiT, lambda: NANO.replace(framepack=False), "64*64"),
    "small": (PortraitDiT, lambda: SMALL_CONFIG, "96*96"),
    "14b": (DiT, wan_s2v_14b, "384*704"),
}


def parse_arguments(argv=None) -> argparse.Namespace:
    parser = cli.Parser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--config", choices=list(CONFIGS), default="14b", help="size of the transformer")
    add("--tiny", action="store_true", help="the same as --config nano")
    add("--size", default=None, help=f"{cli.SIZE}; the config's usual if None")
    add("--layers", type=int, default=None, help="fewer layers, for a device with less memory")
    add("--attention", choices=ATTENTION_KERNELS, default="auto", help="kernel; auto is the best")
    add("--dtype", "--weights", choices=("", "int8", "fp8"), default="", help=cli.DTYPE)
    add("--unroll", type=int, default=None, help="layers per iteration of the loop over them")
    add("--repeats", type=int, default=20, help="steps to time")
    add("--out", default=None, help="JSON file to write")
    return parser.parse_args(argv)


def shrink(config: DiTConfig, layers: int | None) -> DiTConfig:
    """The same with its first layers only."""
    if layers is None:
        return config
    if not 1 <= layers <= config.num_layers:
        raise ValueError(f"--layers {layers}: this config has 1 to {config.num_layers}.")
    inject = tuple(i for i in config.audio_inject_layers if i < layers)
    changes = {"num_layers": layers, "audio_inject_layers": inject}
    return config.replace(unroll=min(config.unroll, layers), **changes)


@dataclass
class Inputs:
    """Random inputs of a streaming step, besides window and sink.

    Attributes:
        network: the transformer.
        conditions: of the stream.
        latent, audio: of the block.
        position: where the block stands; the window is full.
        sigmas: noise level before and after the step.
    """

    network: Network
    conditions: Conditions
    latent: Any
    audio: Any
    position: Any
    sigmas: tuple


def random_inputs(
    build: Callable, config: DiTConfig, grid: tuple[int, int], seed: int = 0, spread: float = 0.02
) -> Inputs:
    """Random weights and inputs.

    Args:
        build: `DiT` or `PortraitDiT`.
        config: size of the transformer.
        grid: latent rows and columns.
        seed: of the random numbers.
        spread: standard deviation of the weights.
    """
    network = Network.abstract(build, config)
    params = jax.block_until_ready(random_params(network.params, seed, spread))
    draw = np.random.default_rng(seed).standard_normal
    put = lambda *shape: jnp.asarray(draw(shape, np.float32), config.dtype)  # noqa: E731
    block, c = config.frames_per_block, config.latent_channels
    conditions = Conditions(
        text=put(1, min(64, config.text_len), config.text_width),
        reference=put(1, 1, *grid, c),
        motion=put(1, 19, *grid, c) if config.framepack else None,
        pose=put(1, block, *grid, config.pose_channels),
    )
    audio = put(1, 1, 4 * block, config.audio_layers, config.audio_width)
    plan = StreamPlan()
    position = plan.position(config, config.ring_blocks, 0)
    sigmas = tuple(np.float32(sigma) for sigma in plan.sigmas[:2])
    latent = put(1, block, *grid, c)
    return Inputs(network.with_params(params), conditions, latent, audio, position, sigmas)


class Step:
    """The compiled step of `streaming.sampler`; every call goes on from the latent before.

    Attributes:
        latent: of the block.
        cache: the window.
        program: what was compiled.
        compile_s: seconds it took.
    """

    def __init__(self, inputs: Inputs, cache: KVCache, sink: Sink):
        device = jax.devices()[0]
        self._block = Conditions(pose=inputs.conditions.pose, audio=inputs.audio)
        self._after = (sink, inputs.position, inputs.sigmas, None)
        self._params = inputs.network.params
        self.latent, self.cache = (
            jnp.copy(inputs.latent),
            jax.device_put(cache, kv_sharding(device)),
        )
        jitted = make_step(inputs.network.without_params(), device)
        began = time.perf_counter()
        self.program = jitted.lower(*self._arguments()).compile()
        self.compile_s = time.perf_counter() - began

    def _arguments(self):
        return (self._params, self.latent, self._block, self.cache, *self._after)

    def __call__(self) -> jax.Array:
        """The latent after the step."""
        self.latent, self.cache = self.program(*self._arguments())
        return self.latent


def kernels_used(config: DiTConfig, cache: KVCache, sink: Sink, tokens: int) -> dict[str, str]:
    """The kernel of each attention of a step."""
    kernels = {"asked": config.attention}

    def look(query, keys):
        for name, key in keys.items():
            kernels[name] = choose_kernel(config.attention, query, key)
        return query

    query = jax.ShapeDtypeStruct((1, tokens, *cache.key.shape[-2:]), cache.key.dtype)
    slots = {"window": cache.key, "prompt": sink.text_key}
    keys = {k: jax.ShapeDtypeStruct(v.shape[1:], v.dtype) for k, v in slots.items()}
    jax.eval_shape(look, query, keys)
    return kernels | {"audio": "xla"}  # a few keys per frame


def run(build: Callable, config: DiTConfig, size: str, repeats: int) -> dict:
    """Times a step.

    Args:
        build: `DiT` or `PortraitDiT`.
        config: size of the transformer.
        size: of the video, "HEIGHT*WIDTH".
        repeats: steps to time.
    """
    grid = latent_grid(size, 64 if config.framepack else 16)
    began = time.perf_counter()
    inputs = random_inputs(build, config, grid)
    made = time.perf_counter() - began
    sink, prefill = time_prefill(inputs, max(1, repeats // 4))
    step = Step(inputs, empty_cache(config, 1, *grid), sink)
    for _ in range(2):
        jax.block_until_ready(step())
    times = measure(step, repeats)
    began = time.perf_counter()
    for _ in range(repeats):
        moved = step()
    jax.block_until_ready(moved)
    back_to_back = (time.perf_counter() - began) / repeats
    return {
        **describe(config, grid, inputs, step, sink),
        "make_weights_s": round(made, 2),
        "compile_s": round(step.compile_s, 2),
        "prefill": prefill,
        "step": quantiles(times),
        "step_back_to_back_ms": round(1000 * back_to_back, 3),
        **rates(config, grid, times),
        "memory": memory_use(
            step.program,
            weights=weight_bytes(inputs.network.params),
            window_and_sink=weight_bytes((step.cache, sink)),
        ),
    }


def time_prefill(inputs, repeats: int) -> tuple[Any, dict]:
    """The sink, and how long it takes, compiling included and apart."""
    prefill = make_prefill(inputs.network.without_params(), jax.devices()[0])
    call = lambda: prefill(inputs.network.params, inputs.conditions)  # noqa: E731
    began = time.perf_counter()
    sink = jax.block_until_ready(call())
    first = time.perf_counter() - began
    return sink, {"first_s": round(first, 2)} | quantiles(measure(call, repeats))


def describe(config: DiTConfig, grid: tuple[int, int], inputs, step, sink) -> dict:
    """Shapes, types and kernels of what is timed."""
    tokens = config.frames_per_block * (grid[0] // 2) * (grid[1] // 2)
    return {
        "framework": "jax",
        "size": f"{8 * grid[0]}*{8 * grid[1]}",
        "dtype": str(config.dtype),
        "weights": config.weights or str(config.param_dtype),
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(inputs.network.params)),
        "shapes": {
            "latent": list(step.latent.shape),
            "tokens": tokens,
            "window": step.cache.key.shape[2],
            "prompt": config.text_len,
            "width": config.width,
            "layers": config.num_layers,
        },
        "attention": kernels_used(config, step.cache, sink, tokens),
        "custom_calls": custom_calls(step.program),
        "cached_text": "always: the sink holds the prompt's keys and values",
        "unroll": config.unroll,
    }


def rates(config: DiTConfig, grid: tuple[int, int], times: list[float]) -> dict:
    """Operations and frames per second, and the share of the device's peak."""
    bound = lambda hardware: compute_bound(config, *grid, hardware, config.weights)  # noqa: E731
    median, frames = float(np.median(times)), 4 * config.frames_per_block
    return {
        **speed(times, step_flops(config, *grid)),
        **share_of_peak(jax.devices()[0].device_kind, times, bound),
        # Frames per second of the transformer alone, its steps in turn or one per device.
        "fps_sequential": round(frames / (StreamPlan().num_steps * median), 3),
        "fps_pipelined": round(frames / median, 3),
    }


def main(argv=None) -> dict:
    arguments = parse_arguments(argv)
    name = "nano" if arguments.tiny else arguments.config
    build, make_config, usual = CONFIGS[name]
    config = shrink(make_config(), arguments.layers)
    if jax.default_backend() == "cpu" and config.width > 1024 and config.num_layers > 8:
        raise ValueError(
            "the 14B needs 60 GB and minutes a step on a CPU; pass --tiny, --config small or "
            "--layers 1."
        )
    config = config.replace(
        attention=arguments.attention,
        weights=arguments.dtype,
        unroll=arguments.unroll or config.unroll,
    )
    record = {
        "benchmark": "dit_step",
        "config": name,
        **run(build, config, arguments.size or usual, arguments.repeats),
        **environment(),
    }
    return emit(record, arguments.out)


if __name__ == "__main__":
    cli.run(main)

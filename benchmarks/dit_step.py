"""One streaming step of a transformer of random weights: time, arithmetic, memory.

    python benchmarks/dit_step.py --config small
    python benchmarks/dit_step.py --config 14b          one device with 60 GB
    python benchmarks/dit_step.py --config 14b --layers 8 --size 384*704

The window is full, as it is from the fifth block of a stream on. Weights are made on the device,
so that nothing is read or sent.
"""

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from benchmarks.common import NANO, SMALL_CONFIG, emit, environment, measure, quantiles
from jax_avatar.models.cache import empty_cache
from jax_avatar.models.config import DiTConfig, wan_s2v_14b
from jax_avatar.models.dit import DiT
from jax_avatar.models.params import abstract
from jax_avatar.models.portrait_dit import PortraitDiT
from jax_avatar.planning.stream import step_flops
from jax_avatar.streaming.plan import Conditions, StreamPlan, denoise, make_prefill

CONFIGS: dict[str, tuple[Callable, Callable[[], DiTConfig], str]] = {
    "nano": (DiT, lambda: NANO, "64*64"),
    "small": (PortraitDiT, lambda: SMALL_CONFIG, "96*96"),
    "14b": (DiT, wan_s2v_14b, "384*704"),
}
_LARGE = 2**26  # elements; above, a leaf is drawn part by part
_COMPILED = 2**24  # elements; below, compiling takes longer than drawing on the host


def parse_arguments(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--config", choices=list(CONFIGS), default="small", help="size of the transformer")
    add("--size", default=None, help="HEIGHT*WIDTH of the video; the config's usual if not given")
    add("--layers", type=int, default=None, help="fewer layers, for a device with less memory")
    add("--repeats", type=int, default=20, help="steps to time")
    add("--out", default=None, help="JSON file to write")
    return parser.parse_args(argv)


def random_params(shapes, seed: int = 0):
    """Small random numbers of the given shapes and types; large ones are drawn on the device."""

    def draw(key, shape, dtype):
        if len(shape) > 1 and np.prod(shape) > _LARGE:
            keys = jax.random.split(key, shape[0])
            return jax.lax.map(lambda k: draw(k, shape[1:], dtype), keys)
        return 0.02 * jax.random.normal(key, shape, dtype)

    draw_one = jax.jit(draw, static_argnums=(1, 2))
    on_host = np.random.default_rng(seed)

    def make(key, leaf):
        if leaf.size > _COMPILED:
            return draw_one(key, leaf.shape, leaf.dtype)
        small = 0.02 * on_host.standard_normal(leaf.shape, np.float32)
        return jnp.asarray(small.astype(leaf.dtype))

    leaves, structure = jax.tree.flatten(shapes)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    drawn = [make(key, leaf) for key, leaf in zip(keys, leaves, strict=True)]
    return jax.tree.unflatten(structure, drawn)


def shrink(config: DiTConfig, layers: int | None) -> DiTConfig:
    """The same with its first layers only."""
    if layers is None:
        return config
    if not 1 <= layers <= config.num_layers:
        raise ValueError(f"--layers {layers}: this config has 1 to {config.num_layers}.")
    inject = tuple(i for i in config.audio_inject_layers if i < layers)
    changes = {"num_layers": layers, "audio_inject_layers": inject}
    return config.replace(unroll=min(config.unroll, layers), **changes)


def latent_grid(size: str) -> tuple[int, int]:
    """Latent rows and columns of a video size."""
    try:
        height, width = (int(side) for side in size.split("*"))
    except ValueError:
        raise ValueError(f"--size {size}: expected HEIGHT*WIDTH, for example 384*704.") from None
    if height % 16 or width % 16 or height < 64 or width < 64:
        raise ValueError(f"--size {size}: sides must be multiples of 16, at least 64.")
    return height // 8, width // 8


def run(build: Callable, config: DiTConfig, size: str, repeats: int) -> dict:
    """Times a step.

    Args:
        build: `DiT` or `PortraitDiT`.
        config: size of the transformer.
        size: of the video, "HEIGHT*WIDTH".
        repeats: steps to time.
    """
    rows, columns = latent_grid(size)
    graphdef, shapes = abstract(lambda: build(config, rngs=nnx.Rngs(0)))
    count = sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(shapes))
    weights = sum(int(np.prod(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(shapes))
    began = time.perf_counter()
    params = jax.block_until_ready(random_params(shapes))
    made = time.perf_counter() - began

    draw = np.random.default_rng(0).standard_normal
    block = (1, config.frames_per_block, rows, columns)
    put = lambda *shape: jnp.asarray(draw(shape, np.float32), config.dtype)  # noqa: E731
    conditions = Conditions(
        put(1, min(64, config.text_len), config.text_width),
        put(1, 1, rows, columns, config.latent_channels),
        put(1, 19, rows, columns, config.latent_channels) if config.framepack else None,
        put(*block, config.pose_channels),
    )
    frames = 4 * config.frames_per_block
    audio = put(1, 1, frames, config.audio_layers, config.audio_width)
    latent = put(*block, config.latent_channels)
    plan = StreamPlan()

    prefill = jax.jit(make_prefill(graphdef))
    began = time.perf_counter()
    sink = jax.block_until_ready(prefill(params, conditions))
    prefill_first = time.perf_counter() - began
    prefill_times = measure(lambda: prefill(params, conditions), max(1, repeats // 4))

    cache = empty_cache(config, 1, rows, columns)
    cache_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves((cache, sink)))
    position = plan.position(config, config.ring_blocks, 0)
    sigmas = [np.float32(sigma) for sigma in plan.schedule.sigmas[:2]]

    def step(params, latent, audio, pose, cache, sink, position, *sigmas):
        return denoise(graphdef, params, latent, audio, pose, cache, sink, position, *sigmas)

    jitted = jax.jit(step, donate_argnames=("cache",))
    began = time.perf_counter()
    arguments = (params, latent, audio, conditions.pose, cache, sink, position, *sigmas)
    compiled = jitted.lower(*arguments).compile()
    compile_s = time.perf_counter() - began

    def call():
        nonlocal cache
        moved, cache = compiled(
            params, latent, audio, conditions.pose, cache, sink, position, *sigmas
        )
        return moved

    for _ in range(2):
        jax.block_until_ready(call())
    times = measure(call, repeats)
    began = time.perf_counter()
    for _ in range(repeats):
        moved = call()
    jax.block_until_ready(moved)
    back_to_back = (time.perf_counter() - began) / repeats

    median = float(np.median(times))
    flops = step_flops(config, rows, columns)
    analysis = compiled.memory_analysis()
    stats = jax.devices()[0].memory_stats() or {}
    gib = lambda size: round(size / 2**30, 3)  # noqa: E731
    steps = plan.schedule.num_steps
    return {
        "dtype": str(config.dtype),
        "parameters": count,
        "shapes": {
            "latent": list(latent.shape),
            "tokens": config.frames_per_block * (rows // 2) * (columns // 2),
            "window": cache.key.shape[2],
            "width": config.width,
            "layers": config.num_layers,
        },
        "make_weights_s": round(made, 2),
        "compile_s": round(compile_s, 2),
        "prefill": {"first_s": round(prefill_first, 2)} | quantiles(prefill_times),
        "step": quantiles(times),
        "step_back_to_back_ms": round(1000 * back_to_back, 3),
        "tflop_per_step": round(flops / 1e12, 6),
        "tflop_per_s": round(flops / 1e12 / median, 4),
        # Frames per second of the transformer alone, its steps in turn or one per device.
        "fps_sequential": round(frames / (steps * median), 3),
        "fps_pipelined": round(frames / median, 3),
        "memory": {
            "weights_gib": gib(weights),
            "window_and_sink_gib": gib(cache_bytes),
            "temporaries_gib": gib(analysis.temp_size_in_bytes) if analysis else None,
            "peak_gib": gib(stats["peak_bytes_in_use"]) if "peak_bytes_in_use" in stats else None,
        },
    }


def main(argv=None) -> dict:
    arguments = parse_arguments(argv)
    build, make_config, usual = CONFIGS[arguments.config]
    size = arguments.size or usual
    config = shrink(make_config(), arguments.layers)
    record = {
        "benchmark": "dit_step",
        "config": arguments.config,
        "size": size,
        **run(build, config, size, arguments.repeats),
        **environment(),
    }
    return emit(record, arguments.out)


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        print(f"dit_step.py: {error}", file=sys.stderr)
        sys.exit(2)

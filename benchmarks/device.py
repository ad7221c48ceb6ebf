"""Helpers of benchmarks of one program on one device: random weights, peaks, memory."""

import collections
import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from conversion.rules import Table, plan_export
from jax_avatar.io.image import fit_size
from jax_avatar.models.network import flatten, unflatten
from jax_avatar.planning.hardware import recognise
from launch.cli import parse_size

__all__ = [
    "custom_calls",
    "latent_grid",
    "memory_use",
    "official_shapes",
    "random_params",
    "share_of_peak",
    "speed",
    "weight_bytes",
]

_LARGE = 2**27  # elements; above, a leaf is drawn part by part
_COMPILED = 2**24  # elements; below, compiling takes longer than drawing on the host
_EIGHT_BITS = 40.0  # standard deviation of eight-bit values, so that few reach the ends


def random_params(shapes: Any, seed: int = 0, spread: float = 0.02) -> Any:
    """Small random numbers of the given shapes and types; large ones are drawn on the device.

    They are drawn in their own type, the largest part by part: no copy in another type is made.

    Args:
        shapes: nested dictionary of `jax.ShapeDtypeStruct`.
        seed: of the random numbers.
        spread: standard deviation; the scales of norms are that much around 1.
    """

    def draw(key, shape, dtype):
        if len(shape) > 1 and np.prod(shape) > _LARGE:
            keys = jax.random.split(key, shape[0])
            return jax.lax.map(lambda k: draw(k, shape[1:], dtype), keys)
        if dtype.itemsize == 1:  # int8 and float8 have no generator of their own
            return (_EIGHT_BITS * jax.random.normal(key, shape, jnp.bfloat16)).astype(dtype)
        return jnp.asarray(spread, dtype) * jax.random.normal(key, shape, dtype)

    draw_one = jax.jit(draw, static_argnums=(1, 2))
    on_host = np.random.default_rng(seed)

    def make(path, key, leaf):
        if path.endswith("kernel_scale"):
            return jnp.full(leaf.shape, spread / _EIGHT_BITS, leaf.dtype)
        if leaf.size > _COMPILED:
            return draw_one(key, leaf.shape, leaf.dtype)
        scale = _EIGHT_BITS if leaf.dtype.itemsize == 1 else spread
        small = scale * on_host.standard_normal(leaf.shape, np.float32)
        small += path.endswith("/scale")
        return jnp.asarray(small.astype(leaf.dtype))

    leaves = flatten(shapes)
    # The generator of the hardware: 14 billion numbers in a second or two.
    keys = jax.random.split(jax.random.key(seed, impl="rbg"), len(leaves))
    drawn = {
        path: make(path, key, leaf) for key, (path, leaf) in zip(keys, leaves.items(), strict=True)
    }
    return unflatten(drawn)


def latent_grid(size: str, multiple: int = 64) -> tuple[int, int]:
    """Latent rows and columns of a video size, which is made to fit as a stream would do it.

    Args:
        size: as `parse_size` of launch/cli.py reads it.
        multiple: of pixels, both sides; 64 for the packing of motion frames, else 16.

    Raises:
        ValueError: something else, or a side below 64.
    """
    height, width = parse_size(size)
    if height < 64 or width < 64:
        raise ValueError(f"--size {size}: sides must be at least 64.")
    if height % multiple or width % multiple:
        height, width = fit_size(height, width, height * width, multiple)
    return height // 8, width // 8


def official_shapes(leaves: Mapping[str, Any], table: Table) -> dict[str, tuple[int, ...]]:
    """Foreign tensor name -> shape, for parameters of which only the shapes need be known.

    Args:
        leaves: our flat path -> anything with a shape.
        table: rules of `conversion`.
    """
    shapes = {}
    for move in plan_export(leaves, table):
        slot = np.broadcast_to(np.int8(0), leaves[move.target].shape[len(move.slot) :])
        shapes[move.source] = move.rule.transform.backward(slot).shape
    return shapes


def weight_bytes(tree: Any) -> int:
    """Bytes of arrays, or of shapes with types."""
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def speed(times: list[float], flops: float | None) -> dict[str, Any]:
    """Rate of arithmetic at the median of times in seconds; empty where nothing is known of it."""
    if not flops:
        return {}
    median = float(np.median(times))
    return {
        "tflop": round(flops / 1e12, 6),
        "tflop_per_s": round(flops / 1e12 / median, 4),
    }


def share_of_peak(
    device_kind: str, times: list[float], bound: Callable[[Any], float]
) -> dict[str, Any]:
    """The shortest time that a device's published peaks allow, and its share of the median.

    Args:
        device_kind: as JAX and drivers name it.
        times: in seconds.
        bound: `hardware -> seconds`.
    """
    hardware = recognise(device_kind)
    if hardware is None:
        return {"hardware": None, "bound_ms": None, "share_of_peak": None}
    seconds = bound(hardware)
    return {
        "hardware": hardware.name,
        "bound_ms": round(1e3 * seconds, 3),
        "share_of_peak": round(seconds / float(np.median(times)), 4),
    }


def memory_use(compiled: Any, **held: int) -> dict[str, float | None]:
    """GiB: what is held by name, the compiler's temporaries, the device's peak if it counts."""
    gib = lambda size: None if size is None else round(size / 2**30, 3)  # noqa: E731
    analysis = compiled.memory_analysis()
    stats = jax.devices()[0].memory_stats() or {}
    return {
        **{f"{name}_gib": gib(size) for name, size in held.items()},
        "temporaries_gib": gib(analysis.temp_size_in_bytes) if analysis else None,
        "peak_gib": gib(stats.get("peak_bytes_in_use")),
    }


def custom_calls(compiled: Any) -> dict[str, int]:
    """Kernels of libraries in a compiled program, and how often each stands there.

    The proof of what attention and products are computed by: "__cudnn$fmhaSoftmax",
    "__cublas$lt$matmul$f8". The body of a loop counts once.
    """
    found = re.findall(r'custom_call_target="([^"]+)"', compiled.as_text())
    return dict(sorted(collections.Counter(found).items()))

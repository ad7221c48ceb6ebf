"""Rotary positions over (frame, row, column).

Angles are computed on the host in float64 from integer positions, so a stream is as exact in
its hundredth hour as in its first minute; the device only ever sees cosines and sines.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from jax_avatar.shapes import Array, Float

__all__ = [
    "Rotation",
    "concat",
    "frame_rotation",
    "grid_rotation",
    "motion_positions",
    "pooled_positions",
    "rotate",
    "split_pairs",
]


class Rotation(NamedTuple):
    """Cosines and sines of one angle per token and channel pair."""

    cos: Array  # n pairs, or b n pairs where the samples stand apart
    sin: Array  # likewise


def split_pairs(head_dim: int) -> tuple[int, int, int]:
    """Channel pairs of a head that turn with the frame, the row and the column."""
    pairs = head_dim // 2
    return pairs - 2 * (pairs // 3), pairs // 3, pairs // 3


def axis_rotation(
    positions: Sequence[int] | np.ndarray, pairs: int, *, theta: float, half: bool
) -> Rotation:
    """Rotation along one axis.

    Args:
        positions: integer positions, of any size and sign.
        pairs: channel pairs of this axis.
        theta: base of the frequencies.
        half: round to float16 by way of float32, as the official causal model stores them.

    Returns:
        Host arrays `[positions, pairs]`, float32.
    """
    frequency = theta ** (-np.arange(pairs, dtype=np.float64) / pairs)
    angle = np.asarray(positions, np.float64)[:, None] * frequency
    factors = [np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)]
    if half:
        factors = [f.astype(np.float16).astype(np.float32) for f in factors]
    return Rotation(*factors)


def frame_rotation(
    frames: Sequence[int] | np.ndarray, head_dim: int, *, theta: float, half: bool
) -> Rotation:
    """Rotation along the frame axis; see `axis_rotation`."""
    return axis_rotation(frames, split_pairs(head_dim)[0], theta=theta, half=half)


def grid_rotation(
    frame: Rotation,
    rows: Sequence[int] | np.ndarray,
    cols: Sequence[int] | np.ndarray,
    head_dim: int,
    *,
    theta: float,
    half: bool,
) -> Rotation:
    """Rotation of all tokens of a (frame, row, column) grid, frame-major.

    Args:
        frame: rotation along the frame axis, host or device, `[frames, pairs]`.
        rows: integer row positions.
        cols: integer column positions.
        head_dim: channels of one head.
        theta: base of the frequencies.
        half: see `axis_rotation`.
    """
    _, pairs_h, pairs_w = split_pairs(head_dim)
    row = axis_rotation(rows, pairs_h, theta=theta, half=half)
    col = axis_rotation(cols, pairs_w, theta=theta, half=half)
    shape = (frame.cos.shape[0], len(rows), len(cols))

    def spread(f, r, c):
        parts = (f[:, None, None], r[None, :, None], c[None, None, :])
        parts = [jnp.broadcast_to(part, (*shape, part.shape[-1])) for part in parts]
        return jnp.concatenate(parts, axis=-1).reshape(np.prod(shape), -1)

    return Rotation(spread(frame.cos, row.cos, col.cos), spread(frame.sin, row.sin, col.sin))


def concat(rotations: Sequence[Rotation]) -> Rotation:
    """Rotations of several groups of tokens, one after the other."""
    return Rotation(*(jnp.concatenate(part, axis=0) for part in zip(*rotations, strict=True)))


def pooled_positions(size: int, pooled: int) -> np.ndarray:
    """Integer positions on a fine axis of `size` that `pooled` coarse tokens take.

    They are sampled, not averaged: equally spaced from first to last, truncated toward zero.
    """
    return np.linspace(0, size - 1, pooled).astype(np.int64)


def motion_positions(
    height: int, width: int
) -> list[tuple[tuple[int, ...], np.ndarray, np.ndarray]]:
    """Frames, rows and columns of the packed motion tokens: near, mid, far; oldest first.

    Args:
        height: latent rows.
        width: latent columns.

    Source: Wan2.2-S2V, frame packer; positions stay when the stream moves on.
    """
    rows, cols = height // 2, width // 2
    return [
        (frames, pooled_positions(rows, rows // pool), pooled_positions(cols, cols // pool))
        for pool, frames in ((1, (-1,)), (2, (-3,)), (4, (-19, -14, -9, -4)))
    ]


def rotate(x: Float[Array, "b n m e"], rotation: Rotation) -> Float[Array, "b n m e"]:
    """Turns adjacent channel pairs of every head by the angle of their token."""
    real, imag = x[..., 0::2].astype(jnp.float32), x[..., 1::2].astype(jnp.float32)
    cos, sin = (part[None] if part.ndim == 2 else part for part in rotation)
    cos, sin = cos[:, :, None], sin[:, :, None]
    turned = jnp.stack([real * cos - imag * sin, real * sin + imag * cos], axis=-1)
    return turned.reshape(x.shape).astype(x.dtype)

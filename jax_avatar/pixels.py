"""Pixels: 8 bits outside of the networks, [-1, 1] inside; the error between two pictures."""

import numpy as np
from jaxtyping import Array, Float, Num, Shaped, UInt8

__all__ = ["frame_psnr", "from_uint8", "psnr", "to_uint8"]

_SMALLEST_ERROR = 1e-2


def from_uint8(pixels: Shaped[Array | np.ndarray, "..."]) -> Float[Array | np.ndarray, "..."]:
    """Pixels 0 to 255 as float32 in [-1, 1]."""
    return pixels.astype(np.float32) / 127.5 - 1


def to_uint8(video: Float[Array | np.ndarray, "..."]) -> UInt8[Array | np.ndarray, "..."]:
    """Pixels in [-1, 1], rounded to 8 bits; what is outside of the range is clipped."""
    return ((video.clip(-1, 1) + 1) * 127.5).round().astype(np.uint8)


def psnr(
    error: Num[np.ndarray, "*n"] | np.floating | float,
) -> Float[np.ndarray, "*n"] | np.floating:
    """Peak signal-to-noise ratio in dB of mean squared errors of 8-bit pixels, 68 at most."""
    return 10 * np.log10(255**2 / np.maximum(error, _SMALLEST_ERROR))


def frame_psnr(
    error: Float[np.ndarray, "T H W"], where: Shaped[np.ndarray, "T H W"] | None = None
) -> Float[np.ndarray, " T"]:
    """Peak signal-to-noise ratio of each frame in dB.

    Args:
        error: squared errors of 8-bit pixels, mean of the channels.
        where: weight of each pixel; all count alike if not given.
    """
    where = np.ones_like(error) if where is None else where
    return psnr((error * where).sum((1, 2)) / where.sum((1, 2)))

"""Causal 3-D convolution over video, whole or chunk by chunk.

XLA computes a 3-D convolution on the CPU about seven times slower than the same sum of 2-D ones,
so there are two backends with equal results.
"""

from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

Backend = Literal["frames", "volume"]


def causal_conv3d(
    x: Float[Array, "b T H W c"],
    kernel: Float[Array, "kt kh kw c o"],
    bias: Float[Array, " o"] | None,
    buffer: Float[Array, "b pt H W c"] | None = None,
    *,
    spatial_padding: int | str = "SAME",
    backend: Backend | None = None,
) -> tuple[Float[Array, "b T Ho Wo o"], Float[Array, "b pt H W c"]]:
    """Convolves frames with the current and the `kt - 1` earlier ones.

    Args:
        x: the frames of this chunk, at least one.
        kernel: weights; the last time tap belongs to the current frame.
        bias: one number per output channel, or none.
        buffer: the `kt - 1` input frames before this chunk; none means zeros, which is how a clip
            begins.
        spatial_padding: zeros added on each of the four sides, or `"SAME"` / `"VALID"`.
        backend: `"frames"` sums `kt` 2-D convolutions, `"volume"` is one 3-D convolution; by
            default the faster one for the platform that runs.

    Returns:
        The convolved frames, as many as came in, and the buffer for the next chunk.
    """
    kt, frames = kernel.shape[0], x.shape[1]
    if buffer is None:
        buffer = jnp.zeros((x.shape[0], kt - 1, *x.shape[2:]), x.dtype)
    if buffer.shape[1] != kt - 1:
        raise ValueError(
            f"The buffer holds {buffer.shape[1]} frames: a kernel of {kt} time taps needs "
            f"{kt - 1}; pass the buffer that this convolution returned for the chunk before."
        )
    seen = jnp.concatenate([buffer.astype(x.dtype), x], axis=1) if kt > 1 else x
    if isinstance(spatial_padding, int):
        padding = [(spatial_padding, spatial_padding)] * 2
    else:
        padding = jax.lax.padtype_to_pads(
            x.shape[2:4], kernel.shape[1:3], window_strides=(1, 1), padding=spatial_padding
        )
    if backend is None:
        backend = "frames" if jax.default_backend() == "cpu" else "volume"
    if backend == "frames":
        y = sum(
            _conv2d(seen[:, tap : tap + frames], kernel[tap].astype(x.dtype), padding)
            for tap in range(kt)
        )
    else:
        y = jax.lax.conv_general_dilated(
            seen,
            kernel.astype(x.dtype),
            window_strides=(1, 1, 1),
            padding=[(0, 0), *padding],
            dimension_numbers=("NDHWC", "DHWIO", "NDHWC"),
        )
    if bias is not None:
        y = y + jnp.expand_dims(bias.astype(x.dtype), (0, 1, 2, 3))
    return y, seen[:, frames:]


def _conv2d(x: Array, kernel: Array, padding: list[tuple[int, int]]) -> Array:
    """Convolves every frame on its own, the frames laid out as a batch."""
    batch, frames = x.shape[:2]
    y = jax.lax.conv_general_dilated(
        x.reshape(batch * frames, *x.shape[2:]),
        kernel,
        window_strides=(1, 1),
        padding=padding,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    return y.reshape(batch, frames, *y.shape[1:])

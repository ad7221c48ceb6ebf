"""Speech-encoder frames -> one feature per video frame, as the official code picks them.

    50 Hz --linear, end points aligned--> 30 Hz --nearest, zeros past the end--> video frames

A live stream has no end to align to; `positions_at` tells where its video frames lie.

Source: Wan2.2-S2V, `get_audio_embed_bucket_fps`.
"""

import math

import jax.numpy as jnp
import numpy as np

from jax_avatar.shapes import Array, Float, Int, IntScalar

__all__ = [
    "bucket_indices",
    "context_indices",
    "num_frames_30hz",
    "pick_frames",
    "positions_at",
    "to_30hz",
]

_RATE = 30


def num_frames_30hz(frames: int, rate: float = 50.0) -> int:
    """Frames left of `frames` after the change to 30 Hz; the order of operations matters."""
    return int(frames / rate * _RATE)


def to_30hz(
    features: Float[np.ndarray, "l T c"] | Float[Array, "l T c"],
) -> Float[np.ndarray, "l S c"] | Float[Array, "l S c"]:
    """Linear interpolation from 50 Hz to 30 Hz with first and last frames kept.

    Raises:
        ValueError: fewer than two frames, from which nothing is left.
    """
    frames = features.shape[1]
    wanted = num_frames_30hz(frames)
    if wanted < 1:
        raise ValueError(f"{frames} audio frames at 50 Hz; at least 2 (65 ms of sound) are needed.")
    # Positions in float32, as the reference has them: float64 would drift from it on long clips.
    step = np.float32(frames - 1) / np.float32(wanted - 1) if wanted > 1 else np.float32(0)
    position = np.arange(wanted, dtype=np.float32) * step
    before = np.minimum(np.floor(position).astype(np.int64), frames - 1)
    after = np.minimum(before + 1, frames - 1)
    weight = (position - before.astype(np.float32))[None, :, None]
    return (1 - weight) * features[:, before] + weight * features[:, after]


def bucket_indices(frames: int, fps: int, clip_frames: int) -> np.ndarray:
    """The 30 Hz frame that every video frame takes; -1 where the sound is over.

    Args:
        frames: frames at 30 Hz.
        fps: video frames per second.
        clip_frames: video frames per clip; the result is a whole number of clips.
    """
    clips = int(frames / (clip_frames * (_RATE / fps))) + 1
    total = clips * clip_frames
    padded = math.ceil(total / fps * _RATE)
    seconds = np.linspace(0, total / fps, total, endpoint=False)
    index = np.clip(np.round(seconds * _RATE).astype(np.int64), 0, padded - 1)
    return np.where(index < frames, index, -1)


def context_indices(
    index: Int[np.ndarray, " T"], frames: int, fps: int, context: int
) -> Int[np.ndarray, "T C"]:
    """Indices of `bucket_indices` with `context` neighbours on both sides; -1 stays alone.

    Args:
        index: from `bucket_indices`.
        frames: frames at 30 Hz.
        fps: video frames per second; neighbours are one video frame apart, rounded down.
        context: neighbours on each side; the official pipelines take none.
    """
    offsets = np.arange(-context, context + 1) * int(_RATE / fps)
    around = np.clip(index[:, None] + offsets[None], 0, frames - 1)
    return np.where(index[:, None] < 0, -1, around)


def pick_frames(
    features: Float[np.ndarray, "l T c"] | Float[Array, "l T c"], index: Int[np.ndarray, " S"]
) -> Float[Array, "l S c"]:
    """Frames by `bucket_indices`; zeros where the index is -1."""
    picked = jnp.asarray(features)[:, np.maximum(index, 0)]
    return jnp.where((index >= 0)[None, :, None], picked, 0)


def positions_at(first: IntScalar, count: int, fps: int) -> Int[Array, " T"]:
    """The time of video frames of a stream, in 30ths of a second, as `bucket_indices` rounds it.

    Args:
        first: video frame; exact up to 70 million, and only its remainder by `fps` matters if
            times are counted from the last whole second.
        count: consecutive frames.
        fps: video frames per second.
    """
    scaled = _RATE * (first + jnp.arange(count))
    whole, rest = scaled // fps, 2 * (scaled % fps)
    # Half to even.
    return whole + ((rest > fps) | ((rest == fps) & (whole % 2 == 1)))

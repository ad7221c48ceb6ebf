"""Speech-encoder frames -> one feature per video frame, as the official code picks them.

    50 Hz --linear, end points aligned--> 30 Hz --nearest, zeros past the end--> video frames

Source: Wan2.2-S2V, `get_audio_embed_bucket_fps`.
"""

import math

import numpy as np

from jax_avatar.shapes import Float

__all__ = ["bucket_indices", "num_frames_30hz", "to_30hz"]

_RATE = 30


def num_frames_30hz(frames: int, rate: float = 50.0) -> int:
    """Frames left of `frames` after the change to 30 Hz; the order of operations matters."""
    return int(frames / rate * _RATE)


def to_30hz(features: Float[np.ndarray, "l T c"]) -> Float[np.ndarray, "l S c"]:
    """Linear interpolation from 50 Hz to 30 Hz with first and last frames kept.

    Raises:
        ValueError: fewer than two frames, from which nothing is left.
    """
    features = np.asarray(features)
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

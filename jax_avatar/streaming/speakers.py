"""Several speakers: pixel masks of people -> routing masks on the token grid."""

from collections.abc import Callable

import numpy as np

from jax_avatar.shapes import Float

__all__ = ["speaker_masks"]


def speaker_masks(
    pixel_masks: Float[np.ndarray, "u T H W"],
    frames: int,
    rows: int,
    cols: int,
    *,
    tap: Callable[[str, np.ndarray], None] | None = None,
) -> Float[np.ndarray, "u t h2 w2"]:
    """Routing masks: the tokens that each speaker's audio reaches.

    Background tokens hear every speaker, and tokens near two people hear none. Where people
    overlap, the later one in `pixel_masks` counts.

    Args:
        pixel_masks: per person, nonzero where the person is.
        frames: latent frames wanted; a stream uses the first block's for every block.
        rows: token rows, an eighth of half the pixels.
        cols: token columns.
        tap: called with names and intermediate values, for comparison with other code.

    Source: Live Avatar repository, multi-character routing.
    """
    masks = np.asarray(pixel_masks, np.float64)
    for axis, size in ((1, frames), (2, rows), (3, cols)):
        masks = _resize_linear(masks, axis, size)
    present = masks > 0.5
    # Later people override earlier ones.
    later = np.flip(np.cumsum(np.flip(present, 0), 0), 0) - present
    owned = present & (later == 0)
    claimed = np.stack([[_dilate(frame) for frame in person] for person in owned])
    if tap:
        tap("onehot", owned)
        tap("dilated", claimed)
    others = claimed.sum(0)[None] - claimed
    return (others == 0).astype(np.float32)


def _resize_linear(x: np.ndarray, axis: int, size: int) -> np.ndarray:
    """Linear resize along one axis with half-pixel centres, no smoothing."""
    length = x.shape[axis]
    position = np.clip((np.arange(size) + 0.5) * length / size - 0.5, 0, None)
    before = np.minimum(position.astype(np.int64), length - 1)
    after = np.minimum(before + 1, length - 1)
    shape = [1] * x.ndim
    shape[axis] = size
    weight = (position - before).reshape(shape)
    return np.take(x, before, axis) * (1 - weight) + np.take(x, after, axis) * weight


def _dilate(mask: np.ndarray) -> np.ndarray:
    """Grows a mask by a tenth of its bounding box, at least one cell; nothing stays nothing."""
    if not mask.any():
        return mask.astype(np.int64)
    rows, cols = (np.flatnonzero(mask.any(axis)) for axis in (1, 0))
    box = max(rows[-1] - rows[0] + 1, cols[-1] - cols[0] + 1)
    radius = max(1, int(0.1 * box + 0.9999))
    padded = np.pad(mask, radius)
    windows = np.lib.stride_tricks.sliding_window_view(padded, (2 * radius + 1,) * 2)
    return windows.any((2, 3)).astype(np.int64)

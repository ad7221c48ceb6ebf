"""An invisible mark in the pixels of generated video, and how surely it is there.

Every frame gets the same pattern: a grid of 32 cells along the shorter side, each a little lighter
or a little darker by a keyed sequence of signs. The grid scales with the picture, so that a
video that was resized is still marked. The detector averages the frames, takes from each cell what
its neighbours predict, and correlates what is left with the signs.
"""

import functools
import hashlib
import math
from typing import NamedTuple

import numpy as np
import scipy.ndimage
from jaxtyping import UInt8
from PIL import Image

__all__ = ["THRESHOLD", "Detection", "detect", "mark"]

THRESHOLD = 6.0
"""Scores from here on count as marked; at most 1.6e-8 of unmarked videos reach it."""

_CELLS = 32  # along the shorter side
_KEY = b"jax_avatar generated video, version 1"
_LUMA = np.array([0.299, 0.587, 0.114], np.float32)
_NOISE = 1.0  # squared levels: what a codec leaves of a flat picture


class Detection(NamedTuple):
    """Result of watermark detection.

    Attributes:
        score: correlation with the mark in standard deviations of an unmarked video's.
        false_positive_rate: bound on the share of unmarked videos with such a score.
    """

    score: float
    false_positive_rate: float

    @property
    def is_marked(self) -> bool:
        """True if the score is above the false-positive threshold."""
        return self.score >= THRESHOLD


def mark(frames: UInt8[np.ndarray, "T H W 3"]) -> UInt8[np.ndarray, "T H W 3"]:
    """Puts the mark into 8-bit RGB frames: each value moves by 1."""
    lighter, darker = _pattern(*frames.shape[1:3])
    marked = np.minimum(frames, 255 - lighter)  # in 8 bits, without overflow
    for pixels in marked:  # one at a time stays in the processor's cache
        pixels += lighter
        np.maximum(pixels, darker, out=pixels)
        pixels -= darker
    return marked


def detect(frames: UInt8[np.ndarray, "T H W 3"]) -> Detection:
    """Looks for the mark in frames of one video, in whatever size they are now.

    The score is a sum of independent signs with fixed weights, divided by the weights' norm. Over
    the draw of the signs a picture that knows nothing of them reaches a score of z with a
    probability of at most exp(-z^2 / 2) (Hoeffding's inequality), whatever it shows.
    """
    mean = frames.mean(0, dtype=np.float32) @ _LUMA
    rows, columns = _grid(*mean.shape)
    cells = np.asarray(Image.fromarray(mean).resize((columns, rows), Image.Resampling.BOX))
    left = cells - (9 * _around(cells) - cells) / 8
    # Where the picture itself changes from cell to cell, a cell says little.
    weights = left / (_around(left**2) + _NOISE)
    norm = float(np.sqrt((weights**2).sum()))
    score = float((weights * _signs(rows, columns)).sum()) / norm if norm > 0 else 0.0
    return Detection(score, math.exp(-(max(0.0, score) ** 2) / 2))


def _around(cells: np.ndarray) -> np.ndarray:
    """Mean of each cell and its eight neighbours."""
    return scipy.ndimage.uniform_filter(cells, 3, mode="reflect")


def _grid(height: int, width: int) -> tuple[int, int]:
    cell = min(height, width) / _CELLS
    return round(height / cell), round(width / cell)


def _signs(rows: int, columns: int) -> np.ndarray:
    """The keyed sequence, -1 or 1."""
    drawn = hashlib.shake_256(_KEY).digest(-(-rows * columns // 8))
    bits = np.unpackbits(np.frombuffer(drawn, np.uint8))[: rows * columns]
    return bits.reshape(rows, columns) * 2.0 - 1.0


@functools.lru_cache(maxsize=8)
def _pattern(height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Positive and negative parts of the pattern, each `[H W 3]`."""
    rows, columns = _grid(height, width)
    y, x = np.arange(height)[:, None], np.arange(width)
    signs = _signs(rows, columns)[y * rows // height, x * columns // width]
    signs = np.repeat(signs[..., None], 3, axis=-1)
    return (signs > 0).astype(np.uint8), (signs < 0).astype(np.uint8)

"""Similarities between a picture and the square that a portrait is framed in."""

import dataclasses
import math

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image

__all__ = ["EYES_AND_MOUTH", "Framing", "sample", "warp"]

EYES_AND_MOUTH = np.array([[0.6, 0.507], [0.4, 0.507], [0.5, 0.758]])
"""Places of the eye on the picture's right, of the other, and of the mouth, in its widths."""

_MARGIN = 4  # pixels that the filter reads beyond the square


@dataclasses.dataclass(frozen=True, eq=False)
class Framing:
    """Similarity that brings a portrait's eyes and mouth to their places, in picture widths."""

    linear: np.ndarray  # [2 2] turn times scale
    shift: np.ndarray  # [2]

    @classmethod
    def of(
        cls, points: Float[np.ndarray, "n 2"], goal: Float[np.ndarray, "n 2"] = EYES_AND_MOUTH
    ) -> "Framing":
        """The one nearest in least squares, for points in the order of `goal`."""
        a, b = points - points.mean(0), goal - goal.mean(0)
        x, y = a[:, 0] + 1j * a[:, 1], b[:, 0] + 1j * b[:, 1]
        turn = (x.conj() * y).sum() / (abs(x) ** 2).sum()
        linear = np.array([[turn.real, -turn.imag], [turn.imag, turn.real]])
        return cls(linear, goal.mean(0) - linear @ points.mean(0))

    @classmethod
    def around(cls, centre: Float[np.ndarray, " 2"], side: float, roll: float = 0.0) -> "Framing":
        """Square of that side in the picture, turned clockwise by `roll` radians."""
        c, s = math.cos(roll) / side, math.sin(roll) / side
        linear = np.array([[c, s], [-s, c]])
        return cls(linear, 0.5 - linear @ np.asarray(centre, np.float64))

    @property
    def scale(self) -> float:
        """Factor on lengths."""
        return float(np.hypot(*self.linear[0]))

    @property
    def inverse(self) -> "Framing":
        """From the square back to the picture."""
        linear = np.linalg.inv(self.linear)
        return Framing(linear, -linear @ self.shift)

    def after_scaling(self, factor: float) -> "Framing":
        """This one, of points that are scaled first."""
        return Framing(self.linear * factor, self.shift)

    def __call__(self, points: Float[np.ndarray, "... 2"]) -> Float[np.ndarray, "... 2"]:
        """Moves points."""
        return points @ self.linear.T + self.shift


def sample(
    image: UInt8[np.ndarray, "H W 3"], framing: Framing, side: int
) -> UInt8[np.ndarray, "s s 3"]:
    """The square of a picture that `framing` (of its pixels) maps to the unit square.

    As `warp`, but the picture's border is repeated beyond its end.
    """
    back = framing.inverse
    corners = back(np.array([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0], [1.0, 1.0]]))
    low, high = corners.min(0), corners.max(0)
    left, top = np.floor(low).astype(int) - _MARGIN
    right, bottom = np.ceil(high).astype(int) + _MARGIN
    rows = np.arange(top, bottom).clip(0, image.shape[0] - 1)
    columns = np.arange(left, right).clip(0, image.shape[1] - 1)
    part = Image.fromarray(image[rows[:, None], columns])
    placed = Framing(back.linear, back.shift - (left, top))
    return np.asarray(warp(part, placed.after_scaling(1 / side), side, side))


def warp(image: Image.Image, back: Framing, width: int, height: int) -> Image.Image:
    """A picture of that size whose points `back` leads to those of `image`, all in pixels.

    Bicubic where it grows, each pixel the mean of what it covers where it shrinks; black beyond.
    """
    coarse = max(1, int(back.scale / 2))
    fine = max(1, math.ceil(back.scale / coarse - 1e-6))
    (a, b), (d, e) = back.linear / (fine * coarse)
    c, f = back.shift / coarse
    image = image.reduce(coarse) if coarse > 1 else image
    made = image.transform(
        (width * fine, height * fine), Image.Transform.AFFINE, (a, b, c, d, e, f),
        Image.Resampling.BICUBIC,
    )  # fmt: skip
    return made.reduce(fine) if fine > 1 else made

"""The moving square of a stream, put back into the picture that it was taken from."""

import math

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from jax_avatar.portraits.framing import Framing, warp

__all__ = ["WholePicture"]

_FEATHER = 0.08  # width of the edge that fades, in widths of the square
_SHRUNK = 0.75  # pixels of a frame to one of the picture
_LARGEST = 1280  # pixels of the longer side, so that encoding keeps up


class WholePicture:
    """A picture in which a square moves.

    Attributes:
        height: pixel rows, even, as encoders want them.
        width: pixel columns, even.
    """

    def __init__(self, image: UInt8[np.ndarray, "H W 3"], framing: Framing):
        """Prepares all that does not change from frame to frame.

        Args:
            image: 8-bit RGB; reduced to at most 1280 pixels a side.
            framing: from its pixels to widths of the square.
        """
        scale = min(1.0, _LARGEST / max(image.shape[:2]))
        self.height, self.width = (2 * max(1, int(scale * n / 2)) for n in image.shape[:2])
        used = (0, 0, self.width / scale, self.height / scale)
        still = Image.fromarray(image)
        if (self.height, self.width) != image.shape[:2]:
            still = still.resize((self.width, self.height), Image.Resampling.LANCZOS, box=used)
        back = framing.after_scaling(1 / scale)
        corners = back.inverse(np.array([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0], [1.0, 1.0]]))
        left, top = (max(0, math.floor(v)) for v in corners.min(0))
        right = min(self.width, math.ceil(corners[:, 0].max()))
        bottom = min(self.height, math.ceil(corners[:, 1].max()))
        self._corner, self._size = (left, top), (right - left, bottom - top)
        self._picture = np.asarray(still)
        self._still = still.crop((left, top, right, bottom))
        # From pixels of the part that changes to widths of the square.
        self._back = Framing(back.linear, back(np.array([left, top], np.float64)))
        self._mask = Image.fromarray(self._opacity())

    def _opacity(self) -> UInt8[np.ndarray, "h w"]:
        width, height = self._size
        at = np.stack(np.meshgrid(np.arange(width) + 0.5, np.arange(height) + 0.5), -1)
        place = self._back(at)
        edge = np.minimum(place, 1 - place).min(-1).clip(0, _FEATHER) / _FEATHER
        return np.round(255 * edge * edge * (3 - 2 * edge)).astype(np.uint8)

    def __call__(self, frames: UInt8[np.ndarray, "T s s 3"]) -> UInt8[np.ndarray, "T H W 3"]:
        """Frames of the square -> frames of the whole."""
        shown = np.repeat(self._picture[None], len(frames), 0)
        (left, top), (width, height) = self._corner, self._size
        for frame, out in zip(frames, shown, strict=True):
            part = self._still.copy()
            part.paste(self._placed(Image.fromarray(frame)), (0, 0), self._mask)
            out[top : top + height, left : left + width] = np.asarray(part)
        return shown

    def _placed(self, frame: Image.Image) -> Image.Image:
        """A frame where it belongs in the part that changes."""
        side = frame.width
        if side * self._back.scale > _SHRUNK:
            return warp(frame, self._in_pixels(side), *self._size)
        # Bicubic twice as large, then bilinear: twice as fast as all the way bicubic.
        larger = frame.resize((2 * side, 2 * side), Image.Resampling.BICUBIC)
        back = self._in_pixels(2 * side)
        (a, b), (d, e), (c, f) = *back.linear, back.shift
        how = Image.Transform.AFFINE, (a, b, c, d, e, f), Image.Resampling.BILINEAR
        return larger.transform(self._size, *how)

    def _in_pixels(self, side: int) -> Framing:
        return Framing(self._back.linear * side, self._back.shift * side)

"""Is there a face in a picture? BlazeFace, small enough to run in NumPy wherever this package does.

    picture --views--> 128x128 --16 blocks--> a score per anchor --> the highest

Weights and network: MediaPipe's short-range face detector (`face_detection_short_range.tflite`,
Apache-2.0), as float16; Bazarevsky et al., arXiv:1907.05047. It looks for faces of a fifth of the
picture's side and more, so parts of the picture are looked at as well.
"""

import functools
from pathlib import Path

import numpy as np
from PIL import Image
from safetensors.numpy import load_file

from jax_avatar.shapes import Float

__all__ = ["FACE_SCORE", "face_missing", "face_score"]

FACE_SCORE = 0.5
"""Score from which on a picture is taken to show a face."""

_WEIGHTS = Path(__file__).parents[1] / "assets" / "face_detector.safetensors"
_SIDE = 128
_STRIDED = (2, 5, 11)  # blocks that halve rows and columns
_HIGH, _LOW = 10, 15  # blocks after which faces are looked for: 16x16 and 8x8 cells


def face_missing(name: str, image: np.ndarray, portrait: np.ndarray) -> str | None:
    """Warning about a portrait that shows no face; None if it shows one.

    Args:
        name: of the picture, for the message.
        image: all of it, 8-bit RGB `[H W 3]`.
        portrait: the part that the video shows, `[1 1 H W 3]` in [-1, 1].
    """
    shown = ((np.asarray(portrait)[0, 0] + 1) * 127.5).round().astype(np.uint8)
    if face_score(shown) >= FACE_SCORE:
        return None
    size = f"{shown.shape[0]}x{shown.shape[1]}"
    if face_score(image) >= FACE_SCORE:
        return (
            f"{name}: its face is not in the middle, which is all that the video of {size} shows; "
            "cut the picture around the face."
        )
    return f"{name}: no face was found in it; expected a portrait, seen from the front."


def face_score(image: np.ndarray) -> float:
    """Score of the best face in a picture, from 0 to 1; see `FACE_SCORE`.

    Args:
        image: 8-bit RGB `[H W 3]`, upright.
    """
    best = 0.0
    for view in _views(Image.fromarray(image)):
        best = max(best, _score(np.asarray(view, np.float32) / 127.5 - 1))
        if best >= FACE_SCORE:
            break
    return best


def _views(image: Image.Image):
    """The whole, with a margin and without, then its parts; all of the network's size."""
    width, height = image.size
    longest = max(width, height)
    for margin in (1.0, 1.5):
        side = round(longest * margin)
        canvas = Image.new("RGB", (side, side))
        canvas.paste(image, ((side - width) // 2, (side - height) // 2))
        yield canvas.resize((_SIDE, _SIDE), Image.Resampling.BILINEAR, reducing_gap=3.0)
    side = max(32, round(0.5 * longest))
    for top in _starts(height, side):
        for left in _starts(width, side):
            part = image.crop((left, top, left + side, top + side))
            yield part.resize((_SIDE, _SIDE), Image.Resampling.BILINEAR, reducing_gap=3.0)


def _starts(length: int, side: int) -> list[int]:
    """Where parts of that side begin, half over one another; the last ends with the picture."""
    if length <= side:
        return [-((side - length) // 2)]
    count = 1 + -(-2 * (length - side) // side)
    return [round(i * (length - side) / (count - 1)) for i in range(count)]


@functools.cache
def _weights() -> dict[str, np.ndarray]:
    return {name: value.astype(np.float32) for name, value in load_file(_WEIGHTS).items()}


def _score(x: Float[np.ndarray, "128 128 3"]) -> float:
    """The highest score of an anchor."""
    w = _weights()
    x = np.maximum(_spread(x, w["stem.kernel"], 2) + w["stem.bias"], 0)
    scores = []
    for block in range(16):
        at, stride = f"block{block}", 2 if block in _STRIDED else 1
        y = _depthwise(x, w[f"{at}.depthwise"], stride) + w[f"{at}.depthwise_bias"]
        y = y @ w[f"{at}.pointwise"] + w[f"{at}.pointwise_bias"]
        if stride == 2:
            rows, columns, channels = x.shape
            x = x.reshape(rows // 2, 2, columns // 2, 2, channels).max((1, 3))
        x = np.maximum(np.pad(x, ((0, 0), (0, 0), (0, y.shape[-1] - x.shape[-1]))) + y, 0)
        if block in (_HIGH, _LOW):
            name = "score16" if block == _HIGH else "score8"
            scores.append((x @ w[f"{name}.kernel"] + w[f"{name}.bias"]).max())
    return float(1 / (1 + np.exp(-np.clip(max(scores), -80, 80))))


def _taps(x: np.ndarray, size: int, stride: int):
    """Rows and columns under each tap of a kernel, padded so that every stride has an output."""
    pad = size - stride
    before = pad // 2
    padded = np.pad(x, ((before, pad - before), (before, pad - before), (0, 0)))
    rows, columns = (length // stride for length in x.shape[:2])
    for i in range(size):
        for j in range(size):
            yield i, j, padded[i : i + stride * rows : stride, j : j + stride * columns : stride]


def _spread(x: np.ndarray, kernel: np.ndarray, stride: int) -> np.ndarray:
    return sum(part @ kernel[i, j] for i, j, part in _taps(x, len(kernel), stride))


def _depthwise(x: np.ndarray, kernel: np.ndarray, stride: int) -> np.ndarray:
    return sum(part * kernel[i, j] for i, j, part in _taps(x, len(kernel), stride))

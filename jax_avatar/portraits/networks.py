"""MediaPipe's detector of faces, 468 landmarks and outline of an eye, in NumPy.

No device, nothing to compile.

    picture 128x128 --stem, 16 blocks--> score and box of 896 anchors           (BlazeFace)
    face    192x192 --stem, 17 blocks--> 468 points; --14 blocks--> is it a face? (face mesh)
    eye       64x64 --stem, 18 blocks--> outline of the eye, which tells how far it is open

A block is a depthwise and a pointwise convolution beside a skip, which pools where it strides.
Weights: `face_detection_short_range.tflite`, `face_landmark.tflite` and `iris_landmark.tflite`
(Apache-2.0) as float16, by `conversion/faces.py`; Bazarevsky et al., arXiv:1907.05047; Kartynnik et
al., arXiv:1907.06724; Ablavatski et al., arXiv:2006.11341.
"""

import functools
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from jaxtyping import Float
from safetensors.numpy import load_file

__all__ = ["DETECTOR_SIDE", "EYE_SIDE", "MESH_SIDE", "detect", "eye_outline", "mesh"]

DETECTOR_SIDE, MESH_SIDE, EYE_SIDE = 128, 192, 64
_ASSETS = Path(__file__).parents[1] / "assets"
_DETECTOR_STRIDED, _MESH_STRIDED = (2, 5, 11), (2, 5, 8, 11, 14)  # blocks that halve the picture
_EYE_STRIDED = (4, 9, 12, 15)
_FINE, _COARSE = 10, 15  # blocks after which faces are looked for: 16x16 and 8x8 cells
_FORK = 13  # block after which the network goes on to the score, too

Weights = Mapping[str, np.ndarray]


def detect(
    x: Float[np.ndarray, "b 128 128 3"],
) -> tuple[Float[np.ndarray, "b 896"], Float[np.ndarray, "b 896 8 2"]]:
    """Looks for faces of a fifth of the picture's side and more.

    Args:
        x: pictures in [-1, 1].

    Returns:
        Logits of the anchors; and centre, size, and places of the eye on the picture's left, of
        the other eye, nose, mouth and both ears: x and y in widths of the picture.
    """
    w = _weights("face_detector")
    x = np.maximum(_convolve(x, w["stem.kernel"], 2) + w["stem.bias"], 0)
    logits, boxes = [], []
    for i in range(16):
        y = _block(x, w, f"block{i}", 2 if i in _DETECTOR_STRIDED else 1)
        x = np.maximum(y, 0, out=y)
        if i in (_FINE, _COARSE):
            cells = x.shape[1]
            logits.append(_pointwise(x, w, f"score{cells}").reshape(len(x), -1))
            found = _pointwise(x, w, f"box{cells}").reshape(len(x), cells, cells, -1, 8, 2)
            found /= DETECTOR_SIDE
            at = (np.arange(cells, dtype=np.float32) + 0.5) / cells
            places = np.delete(np.arange(8), 1)  # the size does not depend on the anchor
            found[..., places, :] += np.stack(np.meshgrid(at, at), -1)[:, :, None, None]
            boxes.append(found.reshape(len(x), -1, 8, 2))
    return np.concatenate(logits, 1), np.concatenate(boxes, 1)


def mesh(
    x: Float[np.ndarray, "b 192 192 3"],
) -> tuple[Float[np.ndarray, "b 468 3"], Float[np.ndarray, " b"]]:
    """Landmarks of upright faces that fill two thirds of the picture.

    Args:
        x: pictures in [0, 1].

    Returns:
        The points, in widths of the picture: right, down, away from the camera; and logits of
        there being a face.
    """
    w = _weights("face_landmarks")
    x = _prelu(_convolve(x, w["stem.kernel"], 2) + w["stem.bias"], w["stem.slope"])
    fork = x
    for i in range(17):
        at = f"block{i}"
        x = _prelu(_block(x, w, at, 2 if i in _MESH_STRIDED else 1), w[f"{at}.slope"])
        fork = x if i == _FORK else fork
    score = _prelu(_block(fork, w, "score.first", 2), w["score.first.slope"])
    points, logit = _head(x, w, "points"), _head(score, w, "score")
    return points.reshape(len(x), -1, 3) / MESH_SIDE, logit[:, 0]


def eye_outline(x: Float[np.ndarray, "b 64 64 3"]) -> Float[np.ndarray, "b 16 2"]:
    """Outline of eyes on the picture's left, 2.3 times as wide as between the corners.

    Args:
        x: pictures in [0, 1]; those of the other eye flipped.

    Returns:
        Outer corner, seven points of the lower lid, inner corner, seven of the upper lid; right
        and down in widths of the picture.
    """
    w = _weights("eye_outline")
    x = _prelu(_convolve(x, w["stem.kernel"], 2) + w["stem.bias"], w["stem.slope"])
    for i in range(18):
        at, stride = f"block{i}", 2 if i in _EYE_STRIDED else 1
        narrow = f"{at}.narrow"
        if stride == 2:
            y = _convolve(x, w[f"{narrow}.kernel"], 2) + w[f"{narrow}.bias"]
        else:
            y = _pointwise(x, w, narrow)
        y = _separable(_prelu(y, w[f"{narrow}.slope"]), w, at, 1)
        x = _prelu(_with_skip(x, y, stride), w[f"{at}.slope"])
    kernel = w["outline.kernel"]
    points = x.reshape(len(x), -1) @ kernel.reshape(-1, kernel.shape[-1]) + w["outline.bias"]
    return points.reshape(len(x), -1, 3)[:, :16, :2] / EYE_SIDE


def _head(x: np.ndarray, w: Weights, name: str) -> np.ndarray:
    x = _prelu(_pointwise(x, w, f"{name}.narrow"), w[f"{name}.narrow.slope"])
    x = _prelu(_block(x, w, f"{name}.block", 1), w[f"{name}.block.slope"])
    kernel = w[f"{name}.kernel"]  # as large as what is left of the picture
    return x.reshape(len(x), -1) @ kernel.reshape(-1, kernel.shape[-1]) + w[f"{name}.bias"]


@functools.cache
def _weights(name: str) -> Weights:
    loaded = load_file(_ASSETS / f"{name}.safetensors")
    return {key: value.astype(np.float32) for key, value in loaded.items()}


def _block(x: np.ndarray, w: Weights, at: str, stride: int) -> np.ndarray:
    """Sum of both ways, before the activation."""
    return _with_skip(x, _separable(x, w, at, stride), stride)


def _separable(x: np.ndarray, w: Weights, at: str, stride: int) -> np.ndarray:
    y = _depthwise(x, w[f"{at}.depthwise"], stride) + w[f"{at}.depthwise_bias"]
    return y @ w[f"{at}.pointwise"] + w[f"{at}.pointwise_bias"]


def _with_skip(x: np.ndarray, y: np.ndarray, stride: int) -> np.ndarray:
    """`y` with the first channels of `x`, pooled, added in place."""
    if stride == 2:
        b, rows, columns, channels = x.shape
        x = x.reshape(b, rows // 2, 2, columns // 2, 2, channels).max((2, 4))
    y[..., : x.shape[-1]] += x
    return y


def _pointwise(x: np.ndarray, w: Weights, name: str) -> np.ndarray:
    return x @ w[f"{name}.kernel"] + w[f"{name}.bias"]


def _prelu(x: np.ndarray, slope: np.ndarray) -> np.ndarray:
    return np.maximum(x, 0) + slope * np.minimum(x, 0)


def _taps(x: np.ndarray, size: int, stride: int):
    """Rows and columns under each tap of a kernel, padded so that every stride has an output."""
    pad = size - stride
    before = pad // 2
    padded = np.pad(x, ((0, 0), (before, pad - before), (before, pad - before), (0, 0)))
    rows, columns = (length // stride for length in x.shape[1:3])
    for i in range(size):
        for j in range(size):
            yield i, j, padded[:, i : i + stride * rows : stride, j : j + stride * columns : stride]


def _convolve(x: np.ndarray, kernel: np.ndarray, stride: int) -> np.ndarray:
    return sum(part @ kernel[i, j] for i, j, part in _taps(x, len(kernel), stride))


def _depthwise(x: np.ndarray, kernel: np.ndarray, stride: int) -> np.ndarray:
    return sum(part * kernel[i, j] for i, j, part in _taps(x, len(kernel), stride))

"""Reads the opening of the mouth from pixels, to score decoded and generated video.

A small convolutional network, fitted in half a minute to rendered frames whose opening is known.
It sees a square of fixed size hung from the upper lip. The size of the mouth's box stays hidden
from it, and its place is shaken while fitting, because both would tell the opening without a look
at the picture.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Shaped

from jax_avatar.pixels import from_uint8

__all__ = ["MouthProbe", "mouth_crops"]

_SIDE = 32  # pixels that the network sees
_WIDTHS = (24, 32, 48)  # channels after each halving
_BATCH = 64
_Frames = Shaped[np.ndarray, "b H W 3"]
_Boxes = Float[np.ndarray, "b 4"]
_Gap = Float[np.ndarray, " b"]


@dataclass(frozen=True)
class MouthProbe:
    """Pixels -> opening of the lips, in the unit it was fitted to."""

    params: dict[str, Array]
    mean: float
    std: float

    @classmethod
    def fit(
        cls,
        frames: _Frames,
        mouth_boxes: _Boxes,
        lip_gap: _Gap,
        *,
        num_steps: int = 1500,
        seed: int = 0,
    ) -> "MouthProbe":
        """Fits to frames of many people.

        Args:
            frames: uint8, or floats in [-1, 1].
            mouth_boxes: left, top, right, bottom of the lips in pixels.
            lip_gap: opening, any unit.
            num_steps: of Adam, 64 frames each.
            seed: of the initial weights, the choice of frames, and the shaking.
        """
        rng = np.random.default_rng(seed)
        mean, std = float(np.mean(lip_gap)), float(np.std(lip_gap))
        if std == 0:
            raise ValueError("lip_gap is the same in all frames; give frames of speech.")
        margin = max(1, round(0.03 * frames.shape[1]))
        crops = mouth_crops(frames, mouth_boxes, margin=margin)
        target = ((lip_gap - mean) / std).astype(np.float32)
        params = _init(jax.random.key(seed))
        optimiser = optax.adam(optax.cosine_decay_schedule(3e-3, num_steps))
        state = optimiser.init(params)
        wide, weak = crops.shape[1], 2 * margin + 1
        for _ in range(num_steps):
            index = rng.integers(len(crops), size=_BATCH)
            # One shift per step would tie the batch together; a few are as good as one each.
            shift = np.repeat(rng.integers(weak, size=(8, 2)), _BATCH // 8, axis=0)
            batch = np.stack(
                [
                    crops[i, y : y + wide - weak + 1, x : x + wide - weak + 1]
                    for i, (y, x) in zip(index, shift, strict=True)
                ]
            )
            if rng.random() < 0.5:
                batch = batch[:, :, ::-1]
            if rng.random() < 0.25:
                batch = _blurred(batch)
            batch = batch + rng.normal(0, 0.03, batch.shape).astype(np.float32)
            params, state = _fit_step(optimiser.update, params, state, batch, target[index])
        return cls(params, mean, std)

    def predict(self, frames: _Frames, mouth_boxes: _Boxes) -> _Gap:
        """Opening of the lips in each frame."""
        crops = mouth_crops(frames, mouth_boxes)
        parts = [
            np.asarray(_predict(self.params, crops[i : i + 256])) for i in range(0, len(crops), 256)
        ]
        return np.concatenate(parts) * self.std + self.mean


def mouth_crops(
    frames: _Frames, mouth_boxes: Float[np.ndarray, "boxes 4"], *, margin: int = 0
) -> Float[np.ndarray, "b r r 3"]:
    """Squares of a third of the frame around the mouth, as floats in [-1, 1].

    Args:
        frames: uint8, or floats in [-1, 1].
        mouth_boxes: only the middle of the left and right edge, and the top, are used.
        margin: pixels more on every side.
    """
    height, width = frames.shape[1:3]
    if len(frames) != len(mouth_boxes):
        raise ValueError(f"{len(frames)} frames but {len(mouth_boxes)} mouth boxes; give one each.")
    side = round(height / 3) + 2 * margin
    left, top, right, _ = np.asarray(mouth_boxes).T
    x = np.round((left + right) / 2 - side / 2).astype(int)
    y = np.round(top - side * 0.3).astype(int)
    offsets = np.arange(side)
    rows = np.clip(y[:, None] + offsets, 0, height - 1)
    columns = np.clip(x[:, None] + offsets, 0, width - 1)
    index = np.arange(len(frames))[:, None, None]
    crops = frames[index, rows[:, :, None], columns[:, None, :]]
    if crops.dtype == np.uint8:
        return from_uint8(crops)
    return crops.astype(np.float32)


def _blurred(x: np.ndarray) -> np.ndarray:
    x = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)), mode="edge")
    x = (x[:, :-2] + 2 * x[:, 1:-1] + x[:, 2:]) / 4
    return (x[:, :, :-2] + 2 * x[:, :, 1:-1] + x[:, :, 2:]) / 4


def _init(key: Array) -> dict[str, Array]:
    params, channels, side = {}, 3, _SIDE
    for i, width in enumerate(_WIDTHS):
        key, part = jax.random.split(key)
        scale = np.sqrt(2 / (9 * channels))
        params[f"conv{i}"] = scale * jax.random.normal(part, (3, 3, channels, width))
        params[f"bias{i}"] = jnp.zeros(width)
        channels, side = width, side // 2
    first, second = jax.random.split(key)
    inputs = channels * side * side
    params["hidden"] = jax.random.normal(first, (inputs, 64)) * np.sqrt(2 / inputs)
    params["out"] = jax.random.normal(second, (64, 1)) * np.sqrt(1 / 64)
    return params


def _apply(params: dict[str, Array], x: Array) -> Array:
    if x.shape[1] != _SIDE:
        x = jax.image.resize(x, (x.shape[0], _SIDE, _SIDE, 3), "linear")
    # Skin and light should not matter.
    x = (x - x.mean((1, 2, 3), keepdims=True)) / (x.std((1, 2, 3), keepdims=True) + 1e-3)
    for i in range(len(_WIDTHS)):
        x = jax.lax.conv_general_dilated(
            x, params[f"conv{i}"], (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        x = jax.nn.relu(x + params[f"bias{i}"].reshape(1, 1, 1, -1))
    x = jax.nn.relu(x.reshape(x.shape[0], -1) @ params["hidden"])
    return (x @ params["out"])[:, 0]


_predict = jax.jit(_apply)


@partial(jax.jit, static_argnums=0)
def _fit_step(
    update: Any, params: dict[str, Array], state: Any, batch: Array, target: Array
) -> tuple[dict[str, Array], Any]:
    gradient = jax.grad(lambda p: jnp.mean((_apply(p, batch) - target) ** 2))(params)
    updates, state = update(gradient, state)
    return optax.apply_updates(params, updates), state

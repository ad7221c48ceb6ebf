"""Reads the opening of the lips from latents, linearly, for a term of the transformer's loss."""

from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float

from jax_avatar.data.latents import LatentClips
from jax_avatar.shapes import Array, Latent

__all__ = ["MouthReader", "fit_mouth_reader"]


@dataclass(frozen=True)
class MouthReader:
    """A linear map from the latents around the mouth to the lip gap of their video frames."""

    kernel: np.ndarray  # features, 4
    bias: np.ndarray  # 4
    spread: float  # deviation of the lip gap of the clips that it was fitted on

    def __call__(
        self, latent: Latent, reference: Float[Array, "b 1 h w c"], mouth: Array
    ) -> Float[Array, "b T"]:
        """Lip gap of every video frame."""
        features = _mouth_features(latent, reference, mouth, jnp)
        gap = features @ jnp.asarray(self.kernel) + jnp.asarray(self.bias)[None, None]
        return gap.reshape(gap.shape[0], -1)


def fit_mouth_reader(clips: LatentClips, ridge: float = 10.0) -> MouthReader:
    """Ridge regression of the lip gap on how the mouth differs from the portrait's."""
    x = _mouth_features(
        clips.latent.astype(np.float32),
        clips.reference.astype(np.float32),
        clips.mouth.astype(np.float32),
        np,
    )
    x = x.reshape(-1, x.shape[-1]).astype(np.float64)
    y = clips.lip_gap.reshape(len(x), 4).astype(np.float64)
    mean, centre = x.mean(0), y.mean(0)
    gram = (x - mean).T @ (x - mean) + ridge * len(x) * 1e-3 * np.eye(x.shape[1])
    kernel = np.linalg.solve(gram, (x - mean).T @ (y - centre))
    bias = centre - mean @ kernel
    spread = float(clips.lip_gap.std()) + 1e-6
    return MouthReader(kernel.astype(np.float32), bias.astype(np.float32), spread)


def _mouth_features(latent, reference, mouth: Bool[Any, "b t h w"] | Any, np_like):
    """Features linear in the latents: their mean change in a grid over the mouth's box."""
    change = latent - reference
    parts = []
    _, _, h, w = mouth.shape
    rows, cols = np_like.arange(h, dtype=np_like.float32), np_like.arange(w, dtype=np_like.float32)
    mass = mouth.sum((2, 3)) + 1e-6
    row = (mouth.sum(3) * rows[None, None]).sum(2) / mass
    col = (mouth.sum(2) * cols[None, None]).sum(2) / mass
    for dr in (-1.0, 0.0, 1.0):
        for dc in (-1.0, 0.0, 1.0):
            # Bilinear tents, so that the map follows a moving head smoothly.
            tent_row = np_like.maximum(0, 1 - abs(rows[None, None] - (row + dr)[..., None]))
            tent_col = np_like.maximum(0, 1 - abs(cols[None, None] - (col + dc)[..., None]))
            tent = tent_row[..., :, None] * tent_col[..., None, :]
            parts.append(np_like.einsum("bthwc,bthw->btc", change, tent))
    return np_like.concatenate(parts, axis=-1)

"""History Corrupt: noise on the keys and values that later blocks read.

A stream's history has errors that a clip of the data has not. With noise on it, the student learns
to use what is robust.

Source: Live Avatar (arXiv 2512.04677), History Corrupt and its ablation.
"""

import dataclasses
from collections.abc import Callable
from typing import TypeVar

import jax
import jax.numpy as jnp

from jax_avatar.models.cache import KVCache, Sink
from jax_avatar.shapes import Array

__all__ = ["make_corrupt"]

History = TypeVar("History", KVCache, Sink)


def make_corrupt(level: float, on: str = "both") -> Callable[[History, Array], History]:
    """Returns `(keys and values, key) -> the same with noise`.

    Args:
        level: deviation of the noise, relative to the root mean square of a layer and clip; 0 adds
            none.
        on: "k", "v" or "both".
    """
    if not level:
        return lambda history, key: history

    def corrupt(history: History, key: Array) -> History:
        keys = dict(zip(("key", "value"), jax.random.split(key), strict=True))
        changed = {name: _noisy(getattr(history, name), level, keys[name]) for name in _PARTS[on]}
        return dataclasses.replace(history, **changed)

    return corrupt


_PARTS = {"k": ("key",), "v": ("value",), "both": ("key", "value")}


def _noisy(part: Array, level: float, key: Array) -> Array:
    # Per layer and clip: `[l b n m e]`.
    wide = part.astype(jnp.float32)
    size = jnp.sqrt(jnp.mean(jnp.square(wide), axis=(2, 3, 4), keepdims=True))
    noise = jax.random.normal(key, part.shape)
    return (wide + level * size * noise).astype(part.dtype)

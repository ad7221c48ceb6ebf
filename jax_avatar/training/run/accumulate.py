"""Gradients of a batch, part by part: the same mean, a part's memory."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jax_avatar.models.sharding import constrain
from jax_avatar.shapes import Array, PyTree

__all__ = ["accumulate_gradients", "clip_keys"]

Measured = tuple[PyTree, dict[str, Array], PyTree]


def accumulate_gradients(
    measure: Callable[[PyTree], Measured], batch: PyTree, parts: int
) -> Measured:
    """Gradient accumulation: applies `measure` to equal micro-batches and averages.

    Args:
        measure: clips -> their gradients and other measurements, both means over the clips, and
            values of each clip, arrays with clips on their leading axis.
        batch: likewise arrays with clips on their leading axis.
        parts: to cut it into.

    Returns:
        As of `measure`; gradients are summed in float32.
    """
    if parts == 1:
        return measure(batch)

    def cut(leaf):
        # Every device keeps its own clips: part i has clips i, i + parts, ..
        leaf = leaf.reshape(leaf.shape[0] // parts, parts, *leaf.shape[1:])
        return jnp.moveaxis(leaf, 1, 0)

    def join(leaf):
        return jnp.moveaxis(leaf, 0, 1).reshape(-1, *leaf.shape[2:])

    def add(sums, part):
        part = jax.tree.map(lambda leaf: constrain(leaf, "data"), part)
        grads, means, each = measure(part)
        sums = jax.tree.map(lambda t, g: t + g.astype(t.dtype) / parts, sums, (grads, means))
        return sums, each

    stacked = jax.tree.map(cut, batch)
    shapes = jax.eval_shape(measure, jax.tree.map(lambda leaf: leaf[0], stacked))[:2]
    start = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, jnp.float32), shapes)
    (grads, means), each = jax.lax.scan(add, start, stacked)
    return grads, means, jax.tree.map(join, each)


def clip_keys(key: Array, row: Any) -> Array:
    """A key for each clip, by its number in the whole batch, so that no layout changes it."""
    return jax.vmap(lambda number: jax.random.fold_in(key, number))(jnp.asarray(row))

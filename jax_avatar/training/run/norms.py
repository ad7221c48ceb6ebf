"""Norms of gradients, updates and weights, for each family of a network's modules."""

import jax
import jax.numpy as jnp
import optax

from jax_avatar.shapes import Array, PyTree

__all__ = ["average_distance", "family_norms", "family_of", "step_norms"]

_FAMILIES = {
    "injectors": "audio",
    "audio": "audio",
    "self_attention": "attention",
    "cross_attention": "cross_attention",
    "norm_cross": "cross_attention",
    "ffn_in": "ffn",
    "ffn_out": "ffn",
    "modulation": "modulation",
    "time": "modulation",
    "head": "head",
    "head_modulation": "head",
    "patch": "embedding",
    "pose": "embedding",
    "token_kind": "embedding",
    "text_in": "embedding",
    "text_out": "embedding",
    "motion_near": "embedding",
    "motion_mid": "embedding",
    "motion_far": "embedding",
}
"""Name in the path of a transformer's parameter -> family; the first that is known decides."""


def family_of(names: tuple[str, ...]) -> str:
    """Family of a parameter; outside of the transformer, the module that it is in.

    Args:
        names: of the modules that it is in, from the outside, and its own.
    """
    return next((_FAMILIES[name] for name in names if name in _FAMILIES), names[0])


def family_norms(prefix: str, tree: PyTree) -> dict[str, Array]:
    """Euclidean norm of all parameters of each family, float32.

    Args:
        prefix: of the metrics' names, `prefix/family`.
        tree: nested dictionaries of arrays: parameters, gradients, updates or adapters.
    """
    squares: dict[str, Array] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        family = family_of(tuple(str(key.key) for key in path))
        square = jnp.sum(jnp.square(leaf.astype(jnp.float32)))
        squares[family] = squares.get(family, jnp.float32(0)) + square
    return {f"{prefix}/{family}": jnp.sqrt(square) for family, square in squares.items()}


def step_norms(
    role: str, grads: PyTree, update: PyTree, weights: PyTree, cause: Array
) -> dict[str, Array]:
    """Norms of a step, as `grad/family`, `update/family` and `weight/family`.

    Args:
        role: in front of these names.
        grads: before clipping.
        update: that was to be made.
        weights: after the step; of adapters, where only these are trained.
        cause: why it was not made, 0 if it was.
    """
    made = family_norms(f"{role}update", update)
    return {
        **family_norms(f"{role}grad", grads),
        **{name: jnp.where(cause == 0, value, 0.0) for name, value in made.items()},
        **family_norms(f"{role}weight", weights),
    }


def average_distance(average: PyTree, weights: PyTree) -> Array:
    """Norm of the difference of two trees over that of the second."""
    difference = jax.tree.map(lambda a, w: a - w, average, weights)
    return optax.global_norm(difference) / jnp.maximum(optax.global_norm(weights), 1e-12)

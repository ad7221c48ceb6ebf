"""Low-rank adapters of the transformer: `x W + scaling * (x a) b`, on plain dictionaries.

An adapter is a nested dictionary of its own, `path/of/kernel/a` and `path/of/kernel/b`. In training
the frozen base stays one copy, and an adapter is laid beside it (`with_adapter`); it is added to
the kernels (`add_adapter`) only where a model is loaded.
"""

from typing import Any

import jax
import jax.numpy as jnp

from jax_avatar.models.network import flatten, unflatten
from jax_avatar.shapes import Array, PyTree

__all__ = [
    "adapted_kernels",
    "adapter_leaves",
    "add_adapter",
    "init_adapter",
    "is_adapted",
    "with_adapter",
]

_PARTS = (
    "blocks/self_attention/",
    "blocks/cross_attention/",
    "blocks/ffn_",
    "injectors/attention/",
)


def adapted_kernels(params: PyTree) -> list[str]:
    """Paths of the kernels that an adapter changes: attention and feed-forward, all layers.

    Source: Live Avatar's LoRA (arXiv 2512.04677); targets as in its released file.
    """
    return [path for path in flatten(params) if is_adapted(path)]


def is_adapted(path: str) -> bool:
    """True if a parameter is one of `adapted_kernels`."""
    return path.endswith("/kernel") and path.startswith(_PARTS)


def adapter_leaves(params: PyTree, rank: int, dtype: Any = jnp.float32) -> dict[str, Any]:
    """Shapes of an adapter: flat path -> `jax.ShapeDtypeStruct`.

    Args:
        params: of the transformer, real or abstract.
        rank: columns of `a`, rows of `b`.
        dtype: of the factors.
    """
    leaves, flat = {}, flatten(params)
    for path in adapted_kernels(params):
        *stack, inputs, outputs = flat[path].shape
        leaves[f"{path}/a"] = jax.ShapeDtypeStruct((*stack, inputs, rank), dtype)
        leaves[f"{path}/b"] = jax.ShapeDtypeStruct((*stack, rank, outputs), dtype)
    return leaves


def init_adapter(params: PyTree, rank: int, key: Array, dtype: Any = jnp.float32) -> PyTree:
    """A fresh adapter that changes nothing: `a` is uniform, `b` is zero.

    Source: Hu et al., "LoRA", arXiv 2106.09685.
    """
    adapter = {}
    for path, leaf in adapter_leaves(params, rank, dtype).items():
        if path.endswith("/b"):
            adapter[path] = jnp.zeros(leaf.shape, dtype)
        else:
            key, own = jax.random.split(key)
            bound = leaf.shape[-2] ** -0.5
            adapter[path] = jax.random.uniform(own, leaf.shape, dtype, -bound, bound)
    return unflatten(adapter)


def add_adapter(params: PyTree, adapter: PyTree, scaling: float) -> PyTree:
    """Parameters with the adapter added: a product in float32, rounded to the kernel's type.

    Args:
        params: nested dictionary.
        adapter: nested dictionary of the same places, from `init_adapter` or a file.
        scaling: alpha over rank.

    Raises:
        ValueError: the adapter has a place that the parameters have not.
    """
    merged, factors = dict(flatten(params)), flatten(adapter)
    for path in _places(params, factors):
        merged[path] = _add(merged[path], factors[f"{path}/a"], factors[f"{path}/b"], scaling)
    return unflatten(merged)


def with_adapter(params: PyTree, adapter: PyTree) -> PyTree:
    """Parameters of the same network with `adapter_rank`: both trees in one, nothing computed.

    Arguments and errors as in `add_adapter`; the network's config has the scaling.
    """
    factors = flatten(adapter)
    _places(params, factors)
    beside = {path.replace("/kernel/", "/adapter/"): leaf for path, leaf in factors.items()}
    return unflatten(flatten(params) | beside)


def _places(params, factors) -> set[str]:
    places = {path.rpartition("/")[0] for path in factors}
    stray = sorted(places - set(adapted_kernels(params)))
    if stray:
        raise ValueError(
            f"the adapter is for another network: {stray[:5]} are not adapted here; convert the "
            "LoRA for this size of transformer."
        )
    return places


def _add(kernel, a, b, scaling):
    update = jnp.matmul(
        jnp.asarray(a, jnp.float32),
        jnp.asarray(b, jnp.float32),
        precision=jax.lax.Precision.HIGHEST,
    )
    return jnp.asarray(kernel) + (scaling * update).astype(kernel.dtype)

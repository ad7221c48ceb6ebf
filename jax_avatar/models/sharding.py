"""One table from parameter paths to mesh axes: how the transformer's weights are spread.

"stage"   every slice of a pipeline has its own copy
"model"   tensor parallelism: heads and feed-forward are split
"data"    FSDP: what is left of a large weight is cut once more, and gathered where it is used
"""

from collections.abc import Mapping

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jax_avatar.models.params import flatten, unflatten
from jax_avatar.shapes import PyTree

__all__ = ["param_shardings", "param_specs"]

_BY_OUTPUT = ("query", "key", "value", "ffn_in")
_BY_INPUT = ("out", "ffn_out")
_SMALL = 2**16  # elements of a weight that is not worth gathering


def param_specs(params: PyTree, axes: Mapping[str, int], *, smallest: int = _SMALL) -> PyTree:
    """How the transformer's weights are split over the axes of a mesh.

    Projections into heads and into the feed-forward are split by output, those back by input, so
    that a layer needs one sum over the "model" axis per projection back. Over "data", the longest
    other axis that divides is cut.

    Args:
        params: nested dictionary of anything with `shape`.
        axes: mesh axis -> devices, `mesh.shape`; "model" and "data" are looked at.
        smallest: elements below which a weight stays whole over "data".

    Returns:
        Nested dictionary of `PartitionSpec`.

    Source: Shoeybi et al., "Megatron-LM", arXiv 1909.08053; Rajbhandari et al., "ZeRO",
    arXiv 1910.02054.
    """
    specs = {}
    for path, leaf in flatten(params).items():
        spec = _by_model(path, leaf.ndim) if "model" in axes else [None] * leaf.ndim
        if axes.get("data", 1) > 1 and leaf.size >= smallest:
            first = 1 if path.startswith(("blocks/", "injectors/")) else 0  # layers stay together
            free = [i for i in range(first, leaf.ndim) if not spec[i]]
            fitting = [i for i in free if leaf.shape[i] % axes["data"] == 0]
            if fitting:
                spec[max(fitting, key=lambda i: leaf.shape[i])] = "data"
        specs[path] = PartitionSpec(*spec) if any(spec) else PartitionSpec()
    return unflatten(specs)


def param_shardings(params: PyTree, mesh: Mesh, *, smallest: int = _SMALL) -> PyTree:
    """`param_specs` on the devices of a mesh."""
    specs = param_specs(params, mesh.shape, smallest=smallest)
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs)


def _by_model(path: str, ndim: int) -> list[str | None]:
    spec: list[str | None] = [None] * ndim
    if not path.startswith(("blocks/", "injectors/")):
        return spec
    _, layer, leaf = ("/" + path).rsplit("/", 2)
    if layer in _BY_OUTPUT:  # kernels, their scales and biases alike
        spec[-1] = "model"
    elif layer in _BY_INPUT and leaf == "kernel":
        spec[-2] = "model"
    return spec

"""Structure and parameters of a module as a pair; see `Network`, which replaces them."""

from collections.abc import Callable
from typing import Any

from flax import nnx

from jax_avatar.models.network import Network, Params, flatten, unflatten

__all__ = ["abstract", "flatten", "merge", "split", "unflatten"]


def split(module: nnx.Module) -> tuple[Any, Params]:
    """Separates a module into its structure and a nested dictionary of arrays."""
    network = Network.of(module)
    return network.structure, network.params


def merge(graphdef: Any, params: Params) -> Any:
    """Binds `params` to the structure made by `split` or `abstract`; inverse of `split`."""
    return Network(params, graphdef, None).bind()


def abstract(build: Callable[[], nnx.Module]) -> tuple[Any, Params]:
    """Structure and `jax.ShapeDtypeStruct` parameters of a module, without allocating it."""
    return split(nnx.eval_shape(build))

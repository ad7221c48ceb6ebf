"""Modules as plain nested dictionaries of arrays, and back.

`flax.nnx` defines the networks; jitted hot paths take a plain dictionary, which costs
nothing to pass, to shard by a path table, or to save.
"""

from collections.abc import Callable
from typing import Any

from flax import nnx, traverse_util

__all__ = ["abstract", "flatten", "merge", "split", "unflatten"]

Params = dict[str, Any]


def split(module: nnx.Module) -> tuple[Any, Params]:
    """Separates a module into its structure and a nested dictionary of arrays."""
    graphdef, state = nnx.split(module)
    return graphdef, _rename(nnx.to_pure_dict(state), str)


def merge(graphdef: Any, params: Params) -> Any:
    """Binds `params` to the structure made by `split` or `abstract`; inverse of `split`."""
    return nnx.merge(graphdef, _rename(params, lambda key: int(key) if key.isdigit() else key))


def abstract(build: Callable[[], nnx.Module]) -> tuple[Any, Params]:
    """Structure and `jax.ShapeDtypeStruct` parameters of a module, without allocating it.

    Args:
        build: makes the module, for example `lambda: DiT(config, rngs=nnx.Rngs(0))`.
    """
    return split(nnx.eval_shape(build))


def flatten(params: Params) -> dict[str, Any]:
    """Nested dictionary -> one level, keys joined by "/"."""
    return traverse_util.flatten_dict(params, sep="/")


def unflatten(flat: dict[str, Any]) -> Params:
    """Inverse of `flatten`."""
    return traverse_util.unflatten_dict(flat, sep="/")


def _rename(tree: Any, rename: Callable[[Any], Any]) -> Any:
    # Lists of modules have integer keys inside flax; files and path tables want strings.
    if not isinstance(tree, dict):
        return tree
    return {rename(key): _rename(value, rename) for key, value in tree.items()}

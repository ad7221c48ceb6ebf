"""Network: parameters, structure and size of a module as one value, and flat parameters.

`flax.nnx` defines the networks. Parameters are a plain nested dictionary of arrays, which costs
nothing to pass, to shard by a path table, or to save.
"""

from dataclasses import dataclass, field, replace
from typing import Any

import jax
from flax import nnx, traverse_util

__all__ = ["Network", "flatten", "unflatten"]

Params = dict[str, Any]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Network:
    """A module as a value; the leaves of the pytree are its parameters.

    Structure and size are static: JAX hashes them at every call of a compiled function, about half
    a millisecond for a transformer. Where this counts, close over `without_params()`, pass the
    parameters alone, and `bind` them inside.

    Attributes:
        params: nested dictionary of arrays, of shapes, or weights that are still on disk.
        structure: of the module, an `nnx.GraphDef`.
        config: the module's size.
    """

    params: Any
    structure: Any = field(metadata={"static": True}, repr=False)
    config: Any = field(metadata={"static": True})

    @classmethod
    def of(cls, module: nnx.Module) -> "Network":
        """The network of a module, which keeps its own arrays."""
        structure, state = nnx.split(module)
        params = _rename(nnx.to_pure_dict(state), str)
        return cls(params, structure, getattr(module, "config", None))

    @classmethod
    def abstract(cls, module_class: type[nnx.Module], config: Any) -> "Network":
        """A network whose parameters are `jax.ShapeDtypeStruct`; nothing is allocated.

        Args:
            module_class: built as `module_class(config, rngs=rngs)`.
            config: size of the module.
        """
        return cls.of(nnx.eval_shape(lambda: module_class(config, rngs=nnx.Rngs(0))))

    @property
    def module_class(self) -> type[nnx.Module]:
        """Class of the module."""
        return self.structure.nodes[0].type

    def bind(self, params: Params | None = None) -> Any:
        """The module: `network.bind().decode(latent)`.

        Args:
            params: to use instead of the network's own.
        """
        params = self.params if params is None else params
        return nnx.merge(
            self.structure, _rename(params, lambda key: int(key) if key.isdigit() else key)
        )

    def with_params(self, params: Any) -> "Network":
        """The same with other parameters."""
        return replace(self, params=params)

    def without_params(self) -> "Network":
        """Structure and size alone."""
        return replace(self, params=None)


def flatten(params: Params) -> dict[str, Any]:
    """Nested dictionary -> one level, keys joined by "/"."""
    return traverse_util.flatten_dict(params, sep="/")


def unflatten(flat: dict[str, Any]) -> Params:
    """Inverse of `flatten`."""
    return traverse_util.unflatten_dict(flat, sep="/")


def _rename(tree: Any, rename) -> Any:
    # Lists of modules have integer keys inside flax; files and path tables want strings.
    if not isinstance(tree, dict):
        return tree
    return {rename(key): _rename(value, rename) for key, value in tree.items()}

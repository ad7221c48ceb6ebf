"""One table from parameter paths to mesh axes: how the transformer's weights are spread.

"stage"   every slice of a pipeline has its own copy
"model"   tensor parallelism: heads and feed-forward are split
"data"    FSDP: what is left of a large weight is cut once more, and gathered where it is used
"replica" every replica has its own copy; in training it has its own clips, as "data" has

In training, activations are told where to lie (`constrain`) and a layer's weights are gathered
while it runs (`gathered`); without a mesh that has "data", both do nothing.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental.layout import Format
from jax.experimental.layout import Layout as MemoryLayout
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from jax_avatar.shapes import Array, PyTree

__all__ = [
    "batch_sharding",
    "clip_axes",
    "constrain",
    "constrain_params",
    "gathered",
    "kv_sharding",
    "on_mesh",
    "param_shardings",
    "param_specs",
    "put_on",
]

_BY_OUTPUT = ("query", "key", "value", "ffn_in")
_BY_INPUT = ("out", "ffn_out")
_LAYERS = ("blocks/", "injectors/")
SMALL = 2**20
"""Elements below which a weight stays whole over "data"; it is not worth gathering."""


def param_specs(params: PyTree, axes: Mapping[str, int], *, smallest: int | None = None) -> PyTree:
    """Sharding of the transformer's weights over the axes of a mesh.

    Projections into heads and into the feed-forward are split by output, those back by input, so
    that a layer needs one sum over the "model" axis per projection back. Over "data", the longest
    other axis that divides is cut. The factors of an adapter follow their kernel, their rank is
    never cut.

    Args:
        params: anything with `shape` in nested dictionaries; these may lie within other trees, as
            the moments do within the state of an optimiser.
        axes: mesh axis -> devices, `mesh.shape`; "model" and "data" are looked at.
        smallest: elements below which a weight stays whole over "data"; `SMALL` if not given.

    Returns:
        The same tree of `PartitionSpec`.

    Source: Shoeybi et al., "Megatron-LM", arXiv 1909.08053; Rajbhandari et al., "ZeRO",
    arXiv 1910.02054.
    """
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: _spec(_name(path), leaf.shape, axes, smallest), params
    )


def param_shardings(params: PyTree, mesh: Mesh, *, smallest: int | None = None) -> PyTree:
    """`param_specs` on the devices of a mesh."""
    specs = param_specs(params, mesh.shape, smallest=smallest)
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs)


def put_on(tree: PyTree, shardings: PyTree) -> PyTree:
    """Puts arrays where they belong, on the devices of all hosts, where all hosts ask for it.

    Args:
        tree: arrays of this host, the same on each, or arrays that lie on devices of all hosts.
        shardings: one, or a tree of them.
    """
    if jax.process_count() == 1:
        return jax.device_put(tree, shardings)

    def place(leaf: Any, sharding):
        if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
            return jax.jit(lambda leaf: leaf, out_shardings=sharding)(leaf)
        leaf = np.asarray(leaf)
        return jax.make_array_from_callback(leaf.shape, sharding, lambda index: leaf[index])

    if isinstance(shardings, jax.sharding.Sharding):
        return jax.tree.map(lambda leaf: place(leaf, shardings), tree)
    return jax.tree.map(place, tree, shardings)


def clip_axes(axes: Mapping[str, int] | None = None) -> str | tuple[str, str]:
    """The mesh axes that the clips of a batch are spread over: "data", and "replica" if there.

    Args:
        axes: mesh axis -> devices, `mesh.shape`; those of the mesh in sight if not given.
    """
    axes = jax.sharding.get_abstract_mesh().shape if axes is None else axes
    return ("replica", "data") if "replica" in axes else "data"


def constrain(x: Array, *axes: Any) -> Array:
    """Says how an activation lies on the mesh of a training step.

    Args:
        x: any array.
        axes: for each of its first axes a mesh axis (left out where it does not divide), None for
            whole, or `...` for as it comes; "data" stands for `clip_axes`. In a `vmap` over clips
            with `spmd_axis_name=clip_axes()`, clips are spread in any case.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if "data" not in mesh.shape or mesh.size == 1:
        return x

    def place(axis, size):
        if axis is ...:
            return PartitionSpec.UNCONSTRAINED
        axis = clip_axes(mesh.shape) if axis == "data" else axis
        parts = _devices(mesh.shape, axis)
        return axis if parts > 1 and size % parts == 0 else None

    spec = [place(axis, size) for axis, size in zip(axes, x.shape, strict=False)]
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*spec))


def _devices(axes: Mapping[str, int], names: str | Sequence[str] | None) -> int:
    names = (names,) if isinstance(names, str) else names or ()
    return math.prod(axes[name] for name in names)


def on_mesh(function: Callable, mesh: Mesh | None) -> Callable:
    """Wraps the function to trace under `mesh`, so that its sharding constraints resolve."""
    if mesh is None:
        return function

    def call(*arguments):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return function(*arguments)

    return call


def constrain_params(tree: PyTree) -> PyTree:
    """Constrains weights, gradients or a state to the shardings of `param_specs`."""
    mesh = jax.sharding.get_abstract_mesh()
    if "data" not in mesh.shape or mesh.size == 1:
        return tree
    specs = param_specs(tree, mesh.shape)
    return jax.tree.map(jax.lax.with_sharding_constraint, tree, specs)


def gathered(state: PyTree, part: str, count: int) -> PyTree:
    """Weights of one layer, whole over "data" while it runs; their gradients are cut again.

    Without this the compiler may cut the activations by weight instead, and clips would meet.

    Args:
        state: of the layer.
        part: path of the stacked layers, such as "blocks".
        count: layers in the stack.
    """
    axes = jax.sharding.get_abstract_mesh().shape
    if axes.get("data", 1) == 1:
        return state

    def gather(path, leaf):
        cut = _spec(f"{part}/{_name(path)}", (count, *leaf.shape), axes, None)[1:]
        whole = PartitionSpec(*(_without_data(axis) for axis in cut))
        return _gather(leaf, whole, PartitionSpec(*cut))

    return jax.tree_util.tree_map_with_path(gather, state)


def _gather(weight, whole, cut):
    @jax.custom_vjp
    def gather(weight):
        return jax.lax.with_sharding_constraint(weight, whole)

    gather.defvjp(
        lambda weight: (gather(weight), None),
        lambda _, slope: (jax.lax.with_sharding_constraint(slope, cut),),
    )
    return gather(weight)


def _without_data(axis):
    return "model" if axis in ("model", ("model", "data")) else None


def _name(path) -> str:
    """The dictionary keys of a path in a tree; a weight is named alike wherever its tree lies."""
    return "/".join(str(k.key) for k in path if isinstance(k, jax.tree_util.DictKey))


def _spec(path, shape, axes, smallest) -> PartitionSpec:
    spec = _by_model(path, len(shape)) if axes.get("model", 1) > 1 else [None] * len(shape)
    size = 1
    for length in shape:
        size *= length
    if axes.get("data", 1) > 1 and size >= (SMALL if smallest is None else smallest):
        first = 1 if path.startswith(_LAYERS) else 0  # layers stay together
        rank = {"a": len(shape) - 1, "b": len(shape) - 2}.get(_factor(path))
        free = [i for i in range(first, len(shape)) if i != rank]

        def fits(i):
            parts = axes["data"] * (axes["model"] if spec[i] else 1)
            return shape[i] % parts == 0

        # Rather an axis of its own than one that "model" has cut already.
        fitting = sorted(filter(fits, free), key=lambda i: (spec[i] is None, shape[i]))
        if fitting and (rank is not None or not spec[fitting[-1]]):
            spec[fitting[-1]] = ("model", "data") if spec[fitting[-1]] else "data"
    return PartitionSpec(*spec) if any(spec) else PartitionSpec()


def _factor(path: str) -> str:
    """Factor of an adapter at a path: "a", "b", or ""."""
    *_, place, leaf = ("//" + path).split("/")
    return leaf if place in ("kernel", "adapter") and leaf in ("a", "b") else ""


def _by_model(path: str, ndim: int) -> list[str | None]:
    spec: list[str | None] = [None] * ndim
    if not path.startswith(_LAYERS):
        return spec
    factor = _factor(path)
    if factor:
        path = path.rsplit("/", 2)[0] + "/kernel"
    _, layer, leaf = ("/" + path).rsplit("/", 2)
    if layer in _BY_OUTPUT and factor != "a":  # kernels, their scales and biases alike
        spec[-1] = "model"
    elif layer in _BY_INPUT and leaf == "kernel" and factor != "b":
        spec[-2] = "model"
    return spec


def batch_sharding(on: Mesh | jax.Device) -> NamedSharding | SingleDeviceSharding:
    """Sharding of rows of portraits: on a device, or over the "data" axis of a mesh."""
    return (
        NamedSharding(on, PartitionSpec("data"))
        if isinstance(on, Mesh)
        else SingleDeviceSharding(on)
    )


def kv_sharding(on: Mesh | jax.Device) -> NamedSharding | SingleDeviceSharding | Format:
    """Sharding of windows and sinks: `[l b s m e]`, on a pipeline's mesh `[stage l b s m e]`.

    On a mesh, heads are split over the "model" axis, on that of a training run portraits over
    "data". On TPUs, memory has the heads before the slots, since attention there reads one head
    after the other: stored slot by slot, a window would be rewritten as a whole on the way into
    every step, and out of it.
    """
    if isinstance(on, Mesh):
        lead, device = int("stage" in on.shape), on.devices.flat[0]
        axes = ("stage", None, None) if lead else (None, "data")
        sharding = NamedSharding(on, PartitionSpec(*axes, None, "model"))
    else:
        lead, device, sharding = 0, on, SingleDeviceSharding(on)
    if device.platform != "tpu":
        return sharding
    order = (*range(lead + 2), lead + 3, lead + 2, lead + 4)
    return Format(MemoryLayout(major_to_minor=order), sharding)

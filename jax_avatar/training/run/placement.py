"""The mesh of a training run: which devices share the clips, which share every weight.

"8x1"   eight devices, each with its own clips and an eighth of the state ("data", FSDP)
"4x2"   four groups with their own clips; in a group, heads and feed-forward are split ("model")
"16x8x1"  sixteen replicas ("replica") of "8x1": state is cut within a replica only, and gradients
        are summed over replicas, so that the network between hosts carries no weights

Weights, optimiser and average are spread by `models.sharding`, batches by their leading axis.
"""

import json
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jax_avatar.models.sharding import clip_axes, param_shardings, put_on
from jax_avatar.shapes import PyTree

__all__ = [
    "abstract_on",
    "clip_devices",
    "fetched",
    "gathered_values",
    "local_rows",
    "make_training_mesh",
    "on_first_host",
    "parse_training_mesh",
    "place_batch",
    "place_state",
    "shared",
]


def parse_training_mesh(text: str) -> tuple[int, int, int]:
    """Reads "REPLICAxDATAxMODEL", "DATAxMODEL" or "DATA" into replicas, data and model.

    Raises:
        ValueError: it is none of them.
    """
    parts = str(text).replace(" ", "").split("x")
    if not (len(parts) <= 3 and all(re.fullmatch(r"0*[1-9]\d*", part) for part in parts)):
        raise ValueError(
            f"training mesh {text!r}: expected DATAxMODEL devices such as 4x2, a number such as 8, "
            "which is 8x1, or REPLICAxDATAxMODEL such as 16x8x1."
        )
    sizes = [int(part) for part in parts]
    if len(sizes) == 3:
        return tuple(sizes)
    return (1, sizes[0], sizes[1] if len(sizes) == 2 else 1)


def make_training_mesh(
    text: str,
    batch_size: int | None,
    *,
    accumulate: int = 1,
    num_heads: int | None = None,
    devices: Sequence[jax.Device] | None = None,
) -> Mesh:
    """The mesh with the axes "data" and "model", and before them "replica" if there are several.

    Args:
        text: as `parse_training_mesh` reads it; "" takes all devices for "data" if the clips of a
            micro-batch spread evenly over them, else one.
        batch_size: clips of an update, or None if that is not known beforehand.
        accumulate: micro-batches of an update.
        num_heads: of the transformer, if there is one.
        devices: all devices of all hosts if not given.

    Raises:
        ValueError: devices, clips or heads do not spread evenly.
    """
    devices = list(jax.devices() if devices is None else devices)
    if batch_size is not None and batch_size % accumulate:
        raise ValueError(
            f"loop.accumulate={accumulate} does not divide the batch of {batch_size} clips; choose "
            "a divisor."
        )
    clips = None if batch_size is None else batch_size // accumulate
    if not text:
        text = "1" if clips is None or clips % len(devices) else str(len(devices))
    replicas, shards, model = parse_training_mesh(text)
    data = replicas * shards
    layout = f"{replicas}x{shards}x{model}" if replicas > 1 else f"{shards}x{model}"
    if data * model > len(devices) or len(devices) % (data * model):
        raise ValueError(
            f"loop.mesh={layout} takes {data * model} devices, of {len(devices)} here; "
            f"choose DATAxMODEL whose product divides {len(devices)}."
        )
    if jax.process_count() > 1 and data * model != len(devices):
        raise ValueError(
            f"loop.mesh={layout} leaves devices of some hosts idle; take all {len(devices)}, "
            f"for example {len(devices)}x1, with a batch that divides by them."
        )
    if clips is not None and clips % data:
        raise ValueError(
            f"loop.mesh={layout} spreads {clips} clips over {data} devices (a batch of "
            f"{batch_size} in {accumulate} parts); choose a batch that is a multiple of "
            f"{data * accumulate}, or fewer devices for data."
        )
    if num_heads is not None and num_heads % model:
        raise ValueError(
            f"loop.mesh={layout} splits {num_heads} attention heads over {model} devices; "
            f"choose a divisor of {num_heads} for model."
        )
    axes = {"replica": replicas, "data": shards, "model": model}
    if replicas == 1:
        del axes["replica"]
    grid = np.array(devices[: data * model]).reshape(*axes.values())
    return Mesh(grid, tuple(axes), axis_types=(AxisType.Auto,) * len(axes))


def clip_devices(mesh: Mesh) -> int:
    """Over how many devices the clips of a batch are spread."""
    return mesh.shape.get("replica", 1) * mesh.shape["data"]


def place_state(state: PyTree, mesh: Mesh) -> PyTree:
    """Puts weights, or any state that has them in nested dictionaries, where they belong."""
    return put_on(state, param_shardings(state, mesh))


def abstract_on(mesh: Mesh, state: PyTree) -> PyTree:
    """Shapes and places of a state, for restoring or compiling."""
    return jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
        state,
        param_shardings(state, mesh),
    )


def place_batch(batch: PyTree, mesh: Mesh) -> PyTree:
    """Spreads the clips of a batch over "data" and replicas.

    Args:
        batch: host arrays with clips on their leading axis, or scalars for all; on several hosts
            each gives the clips of `local_rows`.
        mesh: of the run.

    Raises:
        ValueError: the clips do not spread evenly.
    """
    sharding, data = _by_clip(mesh), clip_devices(mesh)
    hosts = jax.process_count()

    def place(leaf):
        leaf = np.asarray(leaf)
        if not leaf.ndim:
            return put_on(leaf, NamedSharding(mesh, PartitionSpec()))
        if hosts == 1 and leaf.shape[0] % data:
            raise ValueError(
                f"a batch of {leaf.shape[0]} clips does not spread over {data} devices of "
                f"loop.mesh={'x'.join(map(str, mesh.devices.shape))}; choose another mesh or batch."
            )
        if hosts == 1:
            return jax.device_put(leaf, sharding)
        return jax.make_array_from_process_local_data(sharding, leaf)

    return jax.tree.map(place, batch)


def local_rows(batch_size: int, mesh: Mesh) -> np.ndarray:
    """Numbers of the clips of a batch that this host's devices get, ascending."""
    sharding = _by_clip(mesh)
    places = sharding.addressable_devices_indices_map((batch_size,)).values()
    rows = np.arange(batch_size)
    return np.unique(np.concatenate([rows[index] for index in places]))


def _by_clip(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec(clip_axes(mesh.shape)))


def fetched(tree: PyTree) -> PyTree:
    """Host arrays of a tree that lies on the devices of any hosts; every host must ask for it."""
    if jax.process_count() == 1:
        return jax.device_get(tree)
    from jax.experimental import multihost_utils

    return multihost_utils.process_allgather(tree, tiled=True)


def gathered_values(value: Any) -> list:
    """A number of every host; every host must ask for it."""
    from jax.experimental import multihost_utils

    return np.asarray(multihost_utils.process_allgather(np.asarray(value))).tolist()


def shared(content: Any) -> Any:
    """The first host's plain values, on every host."""
    from jax.experimental import multihost_utils

    text = json.dumps(content).encode() if jax.process_index() == 0 else b""
    size = max(gathered_values(len(text)))
    buffer = np.frombuffer(text.ljust(size), np.uint8)
    return json.loads(bytes(np.asarray(multihost_utils.broadcast_one_to_all(buffer))))


def on_first_host(make: Callable[[], Any]) -> Any:
    """Plain values that the first host makes, on every host; what it raises, too.

    Raises:
        ValueError: `make` failed on the first host, where there are several.
    """
    if jax.process_count() == 1:
        return make()
    content = {}
    if jax.process_index() == 0:
        try:
            content = {"made": make()}
        except Exception as error:  # the other hosts wait, and must hear of it
            content = {"failed": f"{type(error).__name__}: {error}"}
    content = shared(content)
    if "failed" in content:
        raise ValueError(f"on the first host: {content['failed']}")
    return content["made"]

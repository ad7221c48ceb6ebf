"""Placement of a training run's state and batches on the devices of its mesh, on any host.

Weights, optimiser and average are spread by `models.sharding`, batches by their leading axis.
"""

import json
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jax_avatar.models.sharding import clip_axes, param_shardings, put_on
from jax_avatar.shapes import PyTree

__all__ = [
    "abstract_on",
    "clip_devices",
    "fetched",
    "gathered_values",
    "local_rows",
    "on_first_host",
    "place_batch",
    "place_state",
    "shared",
]


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

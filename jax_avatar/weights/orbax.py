"""Orbax checkpoints of one network, which stay on disk until each device reads its own part."""

import shutil
from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts
from flax import traverse_util

from jax_avatar.shapes import PyTree
from jax_avatar.weights.checksums import check_files, recorded
from jax_avatar.weights.finite import check_finite
from jax_avatar.weights.safetensors_file import SafetensorsFile

__all__ = ["KEPT_FILE", "StoredWeights", "open_leaf", "replace_folder"]

KEPT_FILE = "kept.safetensors"
"""In the folder of a converted network: tensors of the download that the network does not use."""


class StoredWeights:
    """Weights of an Orbax checkpoint that are still on disk.

    Attributes:
        config, metadata: from the header.
        leaves: flat path -> `jax.ShapeDtypeStruct`.
    """

    def __init__(self, folder: str | Path):
        """Reads the header and the list of leaves.

        Raises:
            ValueError: the folder is not such a checkpoint, or an unfinished one.
        """
        self.folder = Path(folder).resolve()
        self._sums = set(recorded(self.folder.parent, self.folder.name))
        # All but the numbers.
        self._verify(f"{self.folder.name}/header/", f"{self.folder.name}/params/_")
        try:
            with _checkpointer() as checkpointer:
                args = ocp.args.Composite(header=ocp.args.JsonRestore())
                header = checkpointer.restore(self.folder, args=args)["header"]
                saved = checkpointer.metadata(self.folder).item_metadata["params"]
            tree = getattr(saved, "tree", saved)
            self.config, self.metadata = header["config"], header["metadata"]
            self.leaves = {
                path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
                for path, leaf in traverse_util.flatten_dict(tree, sep="/").items()
            }
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            self._verify(f"{self.folder.name}/")  # the clearer message
            raise ValueError(
                f"{self.folder} is not a finished Orbax checkpoint of this project ({error}); name "
                "the folder of one network, for example DIR/dit."
            ) from error

    @property
    def tree(self) -> dict[str, Any]:
        """Shapes and types as a nested dictionary."""
        return traverse_util.unflatten_dict(self.leaves, sep="/")

    def read(self, path: str, slot: tuple[int, ...] = ()) -> np.ndarray:
        """One leaf, or its part at some indices along the leading axes; errors as `restore`."""
        self._verify(f"{self.folder.name}/params/{path.replace('/', '.')}/")
        array = np.asarray(open_leaf(self.folder, path)[slot].read().result())
        check_finite(self.folder, {path: array})
        return array

    def read_kept(self) -> dict[str, np.ndarray]:
        """Tensors of the download that the network does not use: official name -> array."""
        path = self.folder / KEPT_FILE
        if not path.exists():
            return {}
        return {name: np.array(array) for name, array in SafetensorsFile(path).items()}

    def restore(
        self, shardings: PyTree | None = None, *, only: Collection[str] | None = None
    ) -> dict[str, Any]:
        """Everything, as a nested dictionary.

        Args:
            shardings: nested dictionary of `jax.sharding.Sharding`; every device then reads
                only what is its own. Host arrays if not given.
            only: keys of the outer dictionary to read; all if not given.

        Raises:
            BrokenFile: files are damaged or missing, or weights are NaN or infinity.
        """
        leaves = {k: tree for k, tree in self.tree.items() if only is None or k in only}
        if shardings is None:
            restore_args = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), leaves)
        else:
            restore_args = jax.tree.map(
                lambda leaf, sharding: ocp.ArrayRestoreArgs(
                    sharding=sharding, global_shape=leaf.shape, dtype=leaf.dtype
                ),
                leaves,
                shardings,
            )
        args = ocp.args.PyTreeRestore(
            item=leaves, restore_args=restore_args, partial_restore=only is not None
        )
        names = traverse_util.flatten_dict(leaves, sep=".")
        files = [f"{self.folder.name}/params/{name}/" for name in names]
        with _checkpointer() as checkpointer, ThreadPoolExecutor(1) as beside:
            verified = beside.submit(self._verify, *files)  # while the same files are read
            try:
                args = ocp.args.Composite(params=args)
                restored = checkpointer.restore(self.folder, args=args)["params"]
            except (ValueError, OSError) as error:
                verified.result()
                raise ValueError(f"{self.folder} cannot be read: {error}") from error
            verified.result()
        check_finite(self.folder, traverse_util.flatten_dict(restored, sep="/"))
        return restored

    def _verify(self, *beginnings: str) -> None:
        """Checks the files whose paths begin so, once; each process its share of them."""
        files = sorted(file for file in self._sums if file.startswith(beginnings))
        check_files(self.folder.parent, files[jax.process_index() :: jax.process_count()])
        self._sums -= set(files)


def replace_folder(fresh: Path, folder: Path) -> None:
    """Puts a complete folder in the place of an older one, which stays whole until then."""
    old = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(old, ignore_errors=True)  # of an interrupted replacement
    if folder.exists():
        folder.rename(old)
    fresh.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def open_leaf(folder: Path, path: str) -> ts.TensorStore:
    """The stored array of one leaf of an Orbax checkpoint, for reading or writing parts of it."""
    place = folder / "params" / path.replace("/", ".")
    spec = {"driver": "zarr", "kvstore": {"driver": "file", "path": str(place)}}
    return ts.open(spec, open=True).result()


def _checkpointer() -> ocp.Checkpointer:
    return ocp.Checkpointer(
        ocp.CompositeCheckpointHandler(
            params=ocp.PyTreeCheckpointHandler(), header=ocp.JsonCheckpointHandler()
        )
    )

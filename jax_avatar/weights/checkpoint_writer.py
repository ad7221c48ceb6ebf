"""Writes an Orbax checkpoint part by part: no more than one part is ever in memory.

    leaves of zeros, laid out by Orbax --> parts written over them --> renamed when complete

A network of 40 stacked layers has leaves of several gigabytes, which arrive layer by layer. What
an interrupted run has written stays in a hidden folder beside the target, and the next run of the
same conversion goes on from there.
"""

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from flax import traverse_util
from orbax.checkpoint import type_handlers
from safetensors.numpy import save_file

from jax_avatar.weights.checksums import locked, rewriting, take_lock
from jax_avatar.weights.orbax import KEPT_FILE, open_leaf, replace_folder

__all__ = ["ResumableCheckpointWriter"]

_CHUNK_BYTES = 64 << 20
_SAVE_EVERY = 1 << 30  # bytes between notes of what is done


class ResumableCheckpointWriter:
    """An Orbax checkpoint for `StoredWeights` that is filled slot by slot.

    Attributes:
        done: labels of the parts that are on disk already.
    """

    def __init__(
        self,
        folder: str | Path,
        leaves: Mapping[str, Any],
        config: Mapping[str, Any],
        metadata: Mapping[str, Any],
    ):
        """Lays out the checkpoint, or finds the one an interrupted run has begun.

        Args:
            folder: of the network, for example DIR/dit; replaced by `finish`.
            leaves: our flat path -> anything with `shape` and `dtype`.
            config: fields of the network's config, plain values.
            metadata: history: command, source, licence.

        Raises:
            ValueError: another process writes there.
        """
        self.folder = Path(folder).resolve()
        self._partial = self.folder.with_name(f".{self.folder.name}.partial")
        self._notes = self._partial / "progress.json"
        header = {"config": dict(config), "metadata": dict(metadata)}
        layout = {path: [list(leaf.shape), str(leaf.dtype)] for path, leaf in leaves.items()}
        # Through JSON and back, so that tuples compare equal to what was read.
        self._plan = json.loads(json.dumps({"header": header, "layout": layout}))
        self.done: set[str] = set()
        self._stores: dict[str, Any] = {}
        self._unsaved = 0
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        with locked(self.folder.parent):
            self._begin(leaves, header)

    def _begin(self, leaves: Mapping[str, Any], header: Mapping[str, Any]) -> None:
        release = self._claim() if (self._partial / "params").is_dir() else lambda: None
        begun = self._read_notes()
        if begun and begun["plan"] == self._plan:
            self._release, self.done = release, set(begun["done"])
            return
        release()
        shutil.rmtree(self._partial, ignore_errors=True)
        _lay_out(self._partial, leaves, header)
        self._release = self._claim()
        self._save_notes()

    def _claim(self) -> Callable[[], None]:
        try:
            return take_lock(self._partial / "params")
        except BlockingIOError:
            raise ValueError(
                f"{self.folder} is being written by another conversion; wait for it, or give "
                "another --out."
            ) from None

    def write(self, label: str, parts: Mapping[tuple[str, tuple[int, ...]], np.ndarray]) -> None:
        """Writes what came of one source tensor.

        Args:
            label: of the source tensor; goes to `done`.
            parts: (our path, indices along the leading axes) -> array.

        Raises:
            OSError: the disk is full or cannot be written.
        """
        writing = []
        try:
            for (path, slot), array in parts.items():
                if path not in self._stores:
                    self._stores[path] = open_leaf(self._partial, path)
                writing.append(self._stores[path][slot].write(array))
                self._unsaved += array.nbytes
            for future in writing:
                future.result()
        except ValueError as error:  # as TensorStore calls what the system refuses
            raise OSError(f"{self._partial} cannot be written: {_reason(error)}") from error
        self.done.add(label)
        if self._unsaved >= _SAVE_EVERY:
            self._save_notes()

    def keep(self, tensors: Mapping[str, np.ndarray]) -> None:
        """Writes foreign tensors beside the weights, as they are.

        Args:
            tensors: official name -> array; `StoredWeights.read_kept` returns them.
        """
        save_file(
            {name: np.ascontiguousarray(array) for name, array in tensors.items()},
            self._partial / KEPT_FILE,
        )

    def finish(self) -> None:
        """Puts the checkpoint in its place. Call it when every part has been written."""
        self._notes.unlink()
        with rewriting(self.folder.parent, self.folder.name):
            replace_folder(self._partial, self.folder)
        self._release()

    def pause(self) -> None:
        """Notes what is done, for the next run; called when a run is interrupted."""
        with contextlib.suppress(OSError):  # an older note will do
            self._save_notes()
        self._release()

    def discard(self) -> None:
        """Leaves nothing behind; called when the source turns out to be broken."""
        shutil.rmtree(self._partial, ignore_errors=True)
        self._release()

    def _read_notes(self) -> dict[str, Any] | None:
        try:
            return json.loads(self._notes.read_text())
        except (OSError, ValueError):
            return None

    def _save_notes(self) -> None:
        temporary = self._notes.with_suffix(".tmp")
        temporary.write_text(json.dumps({"plan": self._plan, "done": sorted(self.done)}))
        os.replace(temporary, self._notes)
        self._unsaved = 0


def _reason(error: ValueError) -> str:
    """Reason of the system, extracted from a message that names every file on the way."""
    text = str(error).split(" [os_error_code")[0]
    return text.rsplit(": ", 1)[-1]


def _lay_out(folder: Path, leaves: Mapping[str, Any], header: Mapping[str, Any]) -> None:
    """A whole checkpoint of zeros, which takes next to no space and time."""
    zeros = {
        path: np.broadcast_to(np.zeros((), leaf.dtype), leaf.shape) for path, leaf in leaves.items()
    }
    params = traverse_util.unflatten_dict(zeros, sep="/")

    def save_args(leaf: np.ndarray) -> ocp.SaveArgs:
        # Layer by layer, as they come and as a stage or a shard reads them.
        stacked = (0,) if leaf.ndim > 2 else ()
        return ocp.SaveArgs(chunk_byte_size=_CHUNK_BYTES, shard_axes=stacked)

    # Arrays of one zero seen many times must not be copied out.
    numpy_handler = type_handlers.NumpyHandler(deepcopy_host_arrays=False)
    registry = type_handlers.create_type_handler_registry((np.ndarray, numpy_handler))
    # One folder per leaf, so that its parts can be written one by one.
    handler = ocp.PyTreeCheckpointHandler(use_ocdbt=False, type_handler_registry=registry)
    handlers = ocp.CompositeCheckpointHandler(params=handler, header=ocp.JsonCheckpointHandler())
    with ocp.Checkpointer(handlers) as checkpointer:
        checkpointer.save(
            folder,
            args=ocp.args.Composite(
                params=ocp.args.PyTreeSave(params, save_args=jax.tree.map(save_args, params)),
                header=ocp.args.JsonSave(dict(header)),
            ),
        )

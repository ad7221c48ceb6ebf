"""Weights on disk: safetensors for what ships, Orbax for what is large or sharded.

    folder/config.json          name of the model, kinds of its networks, settings of its stream
    folder/dit.safetensors      one file per network; its config and history in the header
    folder/dit/                 or an Orbax checkpoint in the same place

Nothing is unpickled.
"""

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts
from flax import traverse_util
from safetensors.numpy import save_file

from jax_avatar.shapes import PyTree
from jax_avatar.weights.checksums import check_files, locked, recorded, rewriting
from jax_avatar.weights.finite import check_finite
from jax_avatar.weights.safetensors_file import SafetensorsFile
from jax_avatar.weights.whole_file import BrokenFile, read_object

__all__ = [
    "KEPT_FILE",
    "StoredWeights",
    "add_to_config",
    "fingerprint",
    "load_header",
    "load_json",
    "load_weights",
    "on_host",
    "open_leaf",
    "open_weights",
    "place",
    "replace_folder",
    "save_json",
    "save_orbax",
    "save_weights",
    "tree_of",
    "with_tuples",
]

KEPT_FILE = "kept.safetensors"
"""In the folder of a converted network: tensors of the download that the network does not use."""

_FLOAT_TYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}


def save_weights(
    folder: str | Path,
    name: str,
    params: PyTree,
    config: Mapping[str, Any],
    metadata: Mapping[str, Any] | None = None,
    *,
    dtype: str | None = None,
) -> Path:
    """Writes a network's weights to `folder/name.safetensors`, whole or not at all.

    Args:
        folder: made if it does not exist.
        name: of the network, for example "dit".
        params: nested dictionary of arrays.
        config: fields of the network's config, plain values.
        metadata: history: command, data hash, licence.
        dtype: store floating-point weights as "float16", "bfloat16" or "float32"; as they are if
            not given. `load_weights` widens them again.

    Returns:
        The file.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    flat = {}
    for path, leaf in traverse_util.flatten_dict(dict(params), sep="/").items():
        array = np.asarray(leaf)
        if dtype and jax.numpy.issubdtype(array.dtype, jax.numpy.floating):
            array = array.astype(_FLOAT_TYPES[dtype])
        flat[path] = np.ascontiguousarray(array)
    header = {"config": json.dumps(config), "metadata": json.dumps(metadata or {})}
    target = folder / f"{name}.safetensors"
    handle, temporary = tempfile.mkstemp(dir=folder, prefix=f".{name}.", suffix=".tmp")
    os.close(handle)
    try:
        with rewriting(folder, name):
            save_file(flat, temporary, metadata=header)
            os.chmod(temporary, 0o644)
            os.replace(temporary, target)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    return target


def load_weights(
    folder: str | Path, name: str, *, widen: bool = True
) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """Reads a network's weights from `folder/name.safetensors` or the Orbax folder `folder/name`.

    Args:
        folder: of the model.
        name: of the network, for example "dit".
        widen: give the floating-point weights of a file as float32, whatever they are stored as.

    Returns:
        Parameters as a nested dictionary of arrays, config and metadata.

    Raises:
        ValueError: there is no such file, or it was not written by this project.
        BrokenFile: it is cut off or damaged, or holds NaN or infinity.
    """
    path = _find_weights(Path(folder), name)
    if path.is_dir():
        stored = StoredWeights(path)
        return stored.restore(), stored.config, stored.metadata
    file = SafetensorsFile(path)
    config, metadata = _parse_header(file)
    flat = {key: _widened(array) if widen else np.array(array) for key, array in file.items()}
    check_finite(path, flat)  # first: it names the tensor
    check_files(folder, [path.name])
    return traverse_util.unflatten_dict(flat, sep="/"), config, metadata


def open_weights(
    folder: str | Path, name: str
) -> tuple["dict[str, Any] | StoredWeights", dict[str, Any], dict[str, Any]]:
    """Like `load_weights`, but an Orbax folder's weights stay on disk until they are placed."""
    path = _find_weights(Path(folder), name)
    if not path.is_dir():
        return load_weights(folder, name)
    stored = StoredWeights(path)
    return stored, stored.config, stored.metadata


def load_header(folder: str | Path, name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Config and metadata of a network, without reading its weights.

    Arguments and errors as in `load_weights`.
    """
    path = _find_weights(Path(folder), name)
    if path.is_dir():
        stored = StoredWeights(path)
        return stored.config, stored.metadata
    return _parse_header(SafetensorsFile(path))


def fingerprint(folder: str | Path, name: str) -> str:
    """A hash that changes when a network's weights are written again, without reading them.

    Made of the header and of the sizes and times of the files; arguments and errors as in
    `load_weights`.
    """
    path = _find_weights(Path(folder), name)
    files = sorted(file for file in path.rglob("*") if file.is_file()) or [path]
    state = [(str(file.relative_to(path)), *_size_and_time(file)) for file in files]
    content = json.dumps([*load_header(folder, name), state], sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()


def _size_and_time(file: Path) -> tuple[int, int]:
    stat = file.stat()
    return stat.st_size, stat.st_mtime_ns


def _find_weights(folder: Path, name: str) -> Path:
    """The file or Orbax folder of a network."""
    file, orbax_folder = folder / f"{name}.safetensors", folder / name
    if file.is_file():
        return file
    if orbax_folder.is_dir():
        return orbax_folder
    present = sorted(p.name for p in folder.iterdir()) if folder.is_dir() else "no such folder"
    raise ValueError(
        f"{folder} holds no weights of '{name}' (found: {present}); expected "
        f"{name}.safetensors or an Orbax folder {name}/. Pass a folder that this project wrote."
    )


def _parse_header(file: SafetensorsFile) -> tuple[dict[str, Any], dict[str, Any]]:
    if "config" not in file.metadata:
        raise ValueError(
            f"{file.path} has no config in its header, so it was not written by this project; "
            "convert foreign weights first (python -m conversion.convert --help)."
        )
    try:
        parts = [json.loads(file.metadata.get(key, "{}")) for key in ("config", "metadata")]
    except (ValueError, RecursionError) as error:
        raise BrokenFile(
            f"{file.path}: config or history in its header is damaged ({error}); copy it again."
        ) from error
    if not all(isinstance(part, dict) for part in parts):
        raise BrokenFile(f"{file.path}: config in its header is no JSON object; copy it again.")
    return tuple(parts)


def save_orbax(
    folder: str | Path,
    params: PyTree,
    config: Mapping[str, Any],
    metadata: Mapping[str, Any] | None = None,
) -> None:
    """Writes a network's weights as an Orbax checkpoint, whole or not at all.

    Args:
        folder: replaced if it exists, once the new one is complete.
        params: nested dictionary of arrays, sharded or not.
        config: fields of the network's config, plain values.
        metadata: history: command, data hash, licence.
    """
    folder = Path(folder).resolve()
    fresh = folder.with_name(f".{folder.name}.new")
    is_first_process = jax.process_index() == 0
    if is_first_process:
        folder.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(fresh, ignore_errors=True)  # of an interrupted save
    header = {"config": dict(config), "metadata": dict(metadata or {})}
    # One folder per leaf, as `StoredWeights` reads and `SlotWriter` writes them.
    handlers = ocp.CompositeCheckpointHandler(
        params=ocp.PyTreeCheckpointHandler(use_ocdbt=False), header=ocp.JsonCheckpointHandler()
    )
    with ocp.Checkpointer(handlers) as checkpointer:
        checkpointer.save(
            fresh,
            args=ocp.args.Composite(
                params=ocp.args.PyTreeSave(params), header=ocp.args.JsonSave(header)
            ),
        )
    if is_first_process:
        with rewriting(folder.parent, folder.name):
            replace_folder(fresh, folder)


def replace_folder(fresh: Path, folder: Path) -> None:
    """Puts a complete folder in the place of an older one, which stays whole until then."""
    old = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(old, ignore_errors=True)  # of an interrupted replacement
    if folder.exists():
        folder.rename(old)
    fresh.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


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


def tree_of(params: PyTree | StoredWeights) -> PyTree:
    """Nested dictionary of shapes and types, wherever the weights are."""
    return params.tree if isinstance(params, StoredWeights) else params


def place(params: PyTree | StoredWeights, shardings: PyTree) -> PyTree:
    """Puts weights where they belong; from disk, no device sees more than its own part.

    Args:
        params: nested dictionary of arrays, or weights on disk.
        shardings: nested dictionary of `jax.sharding.Sharding`.
    """
    if isinstance(params, StoredWeights):
        return params.restore(shardings)
    return jax.device_put(params, shardings)


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


def with_tuples(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of a config as read from JSON, which has no tuples; configs have no lists."""
    return {key: tuple(v) if isinstance(v, list) else v for key, v in fields.items()}


def on_host() -> contextlib.AbstractContextManager:
    """Computes on the CPU in here, where JAX has one: whole networks need no accelerator then."""
    try:
        return jax.default_device(jax.local_devices(backend="cpu")[0])
    except RuntimeError:
        return contextlib.nullcontext()


def save_json(path: str | Path, content: Mapping[str, Any]) -> None:
    """Writes plain values, whole or not at all."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(json.dumps(content, indent=2) + "\n")
    os.replace(temporary, path)


def add_to_config(folder: str | Path, changes: Mapping[str, Any], **defaults: Any) -> None:
    """Adds to the `config.json` of a model folder.

    Args:
        folder: of the model.
        changes: keys to set.
        **defaults: keys to set where they are missing.
    """
    path = Path(folder) / "config.json"
    with locked(folder):
        present = load_json(path) if path.exists() else {}
        save_json(path, {**defaults, **present, **changes})


def load_json(path: str | Path) -> dict[str, Any]:
    """Reads plain values.

    Raises:
        ValueError: there is no such file, or it is not a JSON object.
    """
    return read_object(path)


def _widened(array: np.ndarray) -> np.ndarray:
    is_half = array.dtype in (np.float16, ml_dtypes.bfloat16)
    return array.astype(np.float32) if is_half else np.array(array)

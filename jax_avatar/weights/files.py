"""Weights on disk: safetensors for what ships, Orbax for what is large or sharded.

    folder/config.json          name of the model, kinds of its networks, settings of its stream
    folder/dit.safetensors      one file per network; its config and history in the header
    folder/dit/                 or an Orbax checkpoint in the same place

Nothing is unpickled.
"""

import contextlib
import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
from flax import traverse_util
from safetensors.numpy import save_file

from jax_avatar.shapes import PyTree
from jax_avatar.weights.checksums import check_files, rewriting
from jax_avatar.weights.finite import check_finite
from jax_avatar.weights.orbax import StoredWeights
from jax_avatar.weights.safetensors_file import SafetensorsFile
from jax_avatar.weights.whole_file import BrokenFile, read_object

__all__ = [
    "find_weights",
    "load_header",
    "load_json",
    "load_weights",
    "on_host",
    "open_weights",
    "place",
    "save_json",
    "save_weights",
    "tree_of",
]

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
    path = find_weights(Path(folder), name)
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
    path = find_weights(Path(folder), name)
    if not path.is_dir():
        return load_weights(folder, name)
    stored = StoredWeights(path)
    return stored, stored.config, stored.metadata


def load_header(folder: str | Path, name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Config and metadata of a network, without reading its weights.

    Arguments and errors as in `load_weights`.
    """
    path = find_weights(Path(folder), name)
    if path.is_dir():
        stored = StoredWeights(path)
        return stored.config, stored.metadata
    return _parse_header(SafetensorsFile(path))


def find_weights(folder: Path, name: str) -> Path:
    """The file or Orbax folder of a network; errors as in `load_weights`."""
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


def load_json(path: str | Path) -> dict[str, Any]:
    """Reads plain values.

    Raises:
        ValueError: there is no such file, or it is not a JSON object.
    """
    return read_object(path)


def _widened(array: np.ndarray) -> np.ndarray:
    is_half = array.dtype in (np.float16, ml_dtypes.bfloat16)
    return array.astype(np.float32) if is_half else np.array(array)

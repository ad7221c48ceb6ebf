"""Hashes of a network's weights, wherever and in whichever kind of file they lie."""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

import ml_dtypes
import numpy as np

from jax_avatar.models.network import flatten
from jax_avatar.weights.files import find_weights, load_header, open_weights
from jax_avatar.weights.orbax import StoredWeights, open_leaf

__all__ = ["base_hash", "content_hash", "fingerprint"]

_SAMPLED = 64  # numbers of every leaf that a base is known by


def content_hash(folder: str | Path, name: str) -> str:
    """Hash of a network's config and of all its numbers; it reads every one of them.

    A file, an Orbax folder, and half-precision numbers widened to float32 have the same hash.

    Args:
        folder: of the model.
        name: of the network, for example "vae".
    """
    config, _ = load_header(folder, name)
    digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
    for path, shape, leaf in _numbers(folder, name):
        digest.update(f"{path} {leaf.dtype} {shape}".encode())
        digest.update(leaf.tobytes())
    return digest.hexdigest()


def base_hash(folder: str | Path) -> str:
    """Hash that distinguishes bases, from some numbers of every weight.

    It does not depend on the kind of file. The motion packer, which training may drop, is left out.

    Args:
        folder: that holds the transformer `dit`.
    """
    digest = hashlib.sha256()
    for path, shape, some in _numbers(folder, "dit", _SAMPLED):
        if not path.startswith("motion_"):
            digest.update(f"{path} {shape}".encode() + some.tobytes())
    return digest.hexdigest()


def fingerprint(folder: str | Path, name: str) -> str:
    """A hash that changes when a network's weights are written again, without reading them.

    Made of the header and of the sizes and times of the files; arguments and errors as in
    `load_weights`.
    """
    path = find_weights(Path(folder), name)
    files = sorted(file for file in path.rglob("*") if file.is_file()) or [path]
    state = [(str(file.relative_to(path)), *_size_and_time(file)) for file in files]
    content = json.dumps([*load_header(folder, name), state], sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()


def _size_and_time(file: Path) -> tuple[int, int]:
    stat = file.stat()
    return stat.st_size, stat.st_mtime_ns


def _numbers(
    folder: str | Path, name: str, count: int | None = None
) -> Iterator[tuple[str, tuple[int, ...], np.ndarray]]:
    """Path, shape and numbers of every weight, or the first few, those of two bytes as float32."""
    params, _, _ = open_weights(folder, name)
    stored = params if isinstance(params, StoredWeights) else None
    leaves = stored.leaves if stored else flatten(params)
    for path in sorted(leaves):
        shape = tuple(leaves[path].shape)
        if count is None:
            some = stored.read(path) if stored else leaves[path]
        else:
            corner = (*(0,) * (len(shape) - 1), slice(min(shape[-1], count))) if shape else ()
            some = (open_leaf(stored.folder, path) if stored else leaves[path])[corner]
        some = np.asarray(some)
        is_half = some.dtype in (np.float16, ml_dtypes.bfloat16)
        yield path, shape, some.astype(np.float32) if is_half else some

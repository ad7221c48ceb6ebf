"""A hash of what a network's weights are, wherever and in whichever kind of file they lie."""

import hashlib
import json
from pathlib import Path

import ml_dtypes
import numpy as np
from flax import traverse_util

from jax_avatar.weights.files import StoredWeights, open_weights

__all__ = ["content_hash"]


def content_hash(folder: str | Path, name: str) -> str:
    """Hash of a network's config and of all its numbers; it reads every one of them.

    A file, an Orbax folder, and half-precision numbers widened to float32 have the same hash.

    Args:
        folder: of the model.
        name: of the network, for example "vae".
    """
    params, config, _ = open_weights(folder, name)
    digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
    if isinstance(params, StoredWeights):
        leaves, read = params.leaves, params.read
    else:
        leaves = traverse_util.flatten_dict(params, sep="/")
        read = leaves.__getitem__
    for path in sorted(leaves):
        leaf = np.asarray(read(path))
        if leaf.dtype in (np.float16, ml_dtypes.bfloat16):
            leaf = leaf.astype(np.float32)
        digest.update(f"{path} {leaf.dtype} {leaf.shape}".encode())
        digest.update(leaf.tobytes())
    return digest.hexdigest()

"""Origin of the weights that training starts from: adapters merged into them, and their identity.

A distilled LoRA merged into the base makes a teacher of four steps; distilling or training on
from that gives plausible losses and a wrong result.
"""

import functools
import hashlib
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from jax_avatar.models.params import flatten
from jax_avatar.training.run.journal import warn
from jax_avatar.weights.files import (
    StoredWeights,
    load_header,
    load_json,
    open_leaf,
    open_weights,
)

__all__ = ["base_hash", "check_not_merged", "merge_record"]

_SAMPLED = 64  # numbers of every leaf that a base is known by


def merge_record(folder: str | Path) -> dict[str, Any]:
    """Record of the adapters merged into the transformer of a folder.

    Returns:
        `{"merged": [adapter, ...]}`; empty if its conversion or training did not record it.
    """
    if not folder:
        return {"merged": []}  # random weights
    metadata = load_header(folder, "dit")[1]
    if "merged" in metadata:
        return {"merged": metadata["merged"]}
    if "lora" in metadata:  # an older conversion's record of one
        return {"merged": [{"file": metadata["lora"]}]}
    settings = Path(folder) / "config.json"
    kind = load_json(settings).get("dit") if settings.is_file() else None
    return {"merged": []} if kind == "portrait" else {}  # for which there is no adapter


def check_not_merged(weights: Any) -> None:
    """Refuses folders whose transformer has an adapter merged into it; those absent pass.

    Args:
        weights: `StageWeights` or `DistillWeights`.

    Raises:
        ValueError: a folder's transformer has one; the message names setting and command.
    """
    for setting in ("model", "start", "teacher", "student"):
        folder = getattr(weights, setting, "")
        if not folder or not any((Path(folder) / f).exists() for f in ("dit", "dit.safetensors")):
            continue
        record = merge_record(folder)
        if record.get("merged"):
            names = ", ".join(str(adapter.get("file")) for adapter in record["merged"])
            raise ValueError(
                f"config.weights.{setting}={folder}: the adapter {names} was merged into its "
                "transformer, which is a distilled student then, no teacher or base. Convert the "
                "weights without it: python -m conversion.convert all --src ckpt --out DIR "
                "(without --merge), and name DIR."
            )
        if not record and setting != "model":
            _say_unknown(str(Path(folder).resolve()))


@functools.cache
def _say_unknown(folder: str) -> None:
    warn(
        f"{folder}: its history does not tell whether an adapter was merged into the transformer; "
        "a distilled one must not be a teacher or base. Convert it again to have it recorded."
    )


def base_hash(folder: str | Path) -> str:
    """A hash that tells two bases apart, from some numbers of every weight.

    It does not depend on the kind of file. The motion packer, which training may drop, is left out.

    Args:
        folder: that holds the transformer `dit`.
    """
    params, _, _ = open_weights(folder, "dit")
    is_stored = isinstance(params, StoredWeights)
    leaves = params.leaves if is_stored else flatten(params)
    digest = hashlib.sha256()
    for path in sorted(path for path in leaves if not path.startswith("motion_")):
        shape = leaves[path].shape
        corner = (*(0,) * (len(shape) - 1), slice(min(shape[-1], _SAMPLED))) if shape else ()
        some = (
            open_leaf(params.folder, path)[corner].read().result()
            if is_stored
            else leaves[path][corner]
        )
        some = np.asarray(some)
        wide = some.astype(np.float32) if some.dtype in (np.float16, ml_dtypes.bfloat16) else some
        digest.update(f"{path} {tuple(shape)}".encode() + wide.tobytes())
    return digest.hexdigest()

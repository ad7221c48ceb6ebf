"""Writes a converted network back under its official names, as safetensors.

    python -m conversion.export model/dit --out Wan2.2-S2V-14B
    python -m conversion.export model/lora --out LiveAvatar

What was converted without `--dtype` comes back bit for bit and spelled as it was, with the tensors
that the network does not use but the conversion kept. The others that it ignored are named.
"""

import json
import math
import os
import shutil
import struct
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import absl.logging
import numpy as np
from tqdm import tqdm

from conversion.networks import NETWORKS, NetworkKind
from conversion.readers import SAFETENSORS_NAMES
from conversion.rules import Ignore, Move, plan_export
from jax_avatar.weights.checksums import keep_checksums, rewriting
from jax_avatar.weights.fields import fill_fields
from jax_avatar.weights.orbax import StoredWeights
from jax_avatar.weights.settings import read_config
from launch import cli

__all__ = ["export_network", "kind_of", "main"]

_GB = 10**9


@dataclass(frozen=True)
class _Tensor:
    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[], np.ndarray]

    @property
    def nbytes(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize


def export_network(
    folder: str | Path, out: str | Path, *, shard_gb: float = 10.0
) -> tuple[list[Path], list[Ignore]]:
    """Exports one network of a model folder.

    Args:
        folder: of the network, for example MODEL/dit.
        out: folder to write to.
        shard_gb: most gigabytes per file; more than one file come with an index.

    Returns:
        The files, and the names that cannot be exported.

    Raises:
        ValueError: not a checkpoint of a network that has an official form, or in eight bits.
    """
    if not 0 < shard_gb < math.inf:
        raise ValueError(f"--shard-gb {shard_gb}: expected a size above 0.")
    stored, kind = StoredWeights(folder), kind_of(folder)
    if stored.config.get("weights"):
        raise ValueError(
            f"{folder} holds {stored.config['weights']} weights, which are rounded; export the "
            "checkpoint that was converted without --dtype."
        )
    table = kind.table(fill_fields(kind.config_class, stored.config, f"{folder}: config"))
    tensors = [_moved_back(stored, move) for move in plan_export(stored.leaves, table)]
    for name, array in stored.read_kept().items():
        tensors.append(_Tensor(name, array.shape, array.dtype, lambda array=array: array))
    spelling = stored.metadata.get("spelling", {})
    tensors = [replace(tensor, name=spelling.get(tensor.name, tensor.name)) for tensor in tensors]
    tensors.sort(key=lambda tensor: tensor.name)
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    files = _write_shards(stored, _shards(tensors, shard_gb * _GB), out)
    return files, [entry for entry in table if isinstance(entry, Ignore) and not entry.kept]


def kind_of(folder: str | Path) -> NetworkKind:
    """Kind of the network in a folder such as MODEL/dit, from its model's `config.json`.

    Raises:
        ValueError: there is none beside it, or the network has no official form.
    """
    folder = Path(folder).resolve()
    content = read_config(folder.parent, ())
    for kind in NETWORKS.values():
        if kind.part == folder.name and kind.kind == content.get(folder.name):
            return kind
    known = ", ".join(f"{kind.part} of kind {kind.kind}" for kind in NETWORKS.values())
    raise ValueError(
        f"{folder} holds {folder.name!r} of kind {content.get(folder.name)!r}, which has no "
        f"official form; known are {known}."
    )


def _moved_back(stored: StoredWeights, move: Move) -> _Tensor:
    backward, leaf = move.rule.transform.backward, stored.leaves[move.target]
    slot = np.broadcast_to(np.zeros((), leaf.dtype), leaf.shape[len(move.slot) :])

    def read() -> np.ndarray:
        return np.ascontiguousarray(backward(stored.read(move.target, move.slot)))

    return _Tensor(move.source, tuple(backward(slot).shape), np.dtype(leaf.dtype), read)


def _shards(tensors: Sequence[_Tensor], limit: float) -> list[list[_Tensor]]:
    shards: list[list[_Tensor]] = [[]]
    for tensor in tensors:
        if shards[-1] and sum(t.nbytes for t in shards[-1]) + tensor.nbytes > limit:
            shards.append([])
        shards[-1].append(tensor)
    return shards


def _write_shards(stored: StoredWeights, shards: list[list[_Tensor]], out: Path) -> list[Path]:
    name = "diffusion_pytorch_model" if _is_transformer(stored) else "model"
    names = [f"{name}.safetensors"]
    if len(shards) > 1:
        names = [
            f"{name}-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)
        ]
    needed, free = sum(t.nbytes for s in shards for t in s), shutil.disk_usage(out).free
    if needed > free:
        raise ValueError(
            f"--out {out}: {needed / _GB:.1f} GB are needed and {free / _GB:.1f} GB free; "
            "make room."
        )
    with tqdm(total=needed, unit="B", unit_scale=True, desc="export") as progress:
        keep_checksums(out)
        for path, shard in zip((out / name for name in names), shards, strict=True):
            with rewriting(out, path.stem):
                _write(shard, path, progress)
    files = [out / name for name in names]
    if len(shards) > 1:
        places = {t.name: n for n, s in zip(names, shards, strict=True) for t in s}
        index = out / f"{name}.safetensors.index.json"
        content = {"metadata": {"total_size": needed}, "weight_map": dict(sorted(places.items()))}
        index.write_text(json.dumps(content, indent=2) + "\n")
        files.append(index)
    return files


def _is_transformer(stored: StoredWeights) -> bool:
    # Its files have a name of their own in the official folder.
    return "audio_inject_layers" in stored.config


def _write(shard: list[_Tensor], path: Path, progress) -> None:
    """One safetensors file, tensor after tensor, whole or not at all."""
    header, place = {"__metadata__": {"format": "pt"}}, 0
    for tensor in shard:
        header[tensor.name] = {
            "dtype": SAFETENSORS_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [place, place + tensor.nbytes],
        }
        place += tensor.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(struct.pack("<Q", len(text)) + text)
            for tensor in shard:
                array = tensor.read()
                file.write(array.view(np.uint8).data if array.ndim else array.tobytes())
                progress.update(tensor.nbytes)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = cli.Parser(
        prog="python -m conversion.export",
        description="Writes a converted network back under its official names, as safetensors.",
    )
    parser.add_argument("folder", type=Path, help="one network of a model folder, e.g. MODEL/dit")
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="folder to write to")
    parser.add_argument("--shard-gb", type=float, default=10.0, help="most gigabytes per file")
    flags = parser.parse_args(arguments)
    return cli.exit_code(
        lambda: _run(flags.folder, flags.out, flags.shard_gb), hint="repeat the command"
    )


def _run(folder: Path, out: Path, shard_gb: float) -> None:
    absl.logging.set_verbosity(absl.logging.ERROR)  # Orbax warns of what is meant here
    files, ignored = export_network(folder, out, shard_gb=shard_gb)
    for path in files:
        print(f"{path} ({path.stat().st_size / _GB:.3f} GB)")
    for entry in ignored:
        print(f"not included: {entry.source} ({entry.reason})")


if __name__ == "__main__":
    sys.exit(main())

"""Weight files as lazy mappings: names and shapes at once, arrays on access."""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from conversion.torch_file import TorchFile
from jax_avatar.weights.safetensors_file import SAFETENSORS_NAMES, SafetensorsFile
from jax_avatar.weights.whole_file import BrokenFile, check_whole, read_object, unfinished_downloads

__all__ = [
    "SAFETENSORS_NAMES",
    "SafetensorsFile",
    "ShardedSafetensors",
    "is_shard",
    "open_weights",
    "read_index",
]

_SHARD = re.compile(r"(.*)-\d{5}-of-(?P<count>\d{5})\.safetensors")


def read_index(index: str | Path) -> dict[str, str]:
    """Index of a sharded checkpoint: tensor name -> file beside the index.

    Raises:
        BrokenFile: the index is a pointer, cut off or without places, or names a file that is
            elsewhere or missing.
    """
    index = Path(index)
    places = read_object(index).get("weight_map")
    if not isinstance(places, dict) or not places:
        raise BrokenFile(
            f"{index} has no weight_map of tensors and their files; download it again."
        )
    strange = [name for name in places.values() if not _is_plain_name(name)]
    if strange:
        raise BrokenFile(
            f"{index} names the shard {strange[0]!r}, expected a .safetensors file beside the "
            "index; download it again."
        )
    shards = sorted(set(places.values()))
    missing = [name for name in shards if not (index.parent / name).is_file()]
    if missing:
        begun = len(unfinished_downloads(index.parent))
        raise BrokenFile(
            f"{index}: {len(missing)} of {len(shards)} shards are missing: {', '.join(missing)}"
            + (f", and {begun} downloads are unfinished" if begun else "")
            + "; download them."
        )
    return places


def _is_plain_name(name: object) -> bool:
    return (
        isinstance(name, str)
        and name.endswith(".safetensors")
        and not set(name) & set("/\\\0")
        and not name.startswith(".")
    )


class ShardedSafetensors(Mapping):
    """A checkpoint in several files with an index, `*.safetensors.index.json`."""

    def __init__(self, index: str | Path):
        """Opens every shard that the index names.

        Raises:
            BrokenFile: as `read_index`; or a shard is not whole, or lacks a tensor that the index
                promises.
        """
        index = Path(index)
        places = read_index(index)
        shards = {name: SafetensorsFile(index.parent / name) for name in set(places.values())}
        missing = sorted(name for name, shard in places.items() if name not in shards[shard])
        if missing:
            raise BrokenFile(f"{index}: the shards lack {missing}; download them again.")
        self._shards = {name: shards[shard] for name, shard in places.items()}
        self.files = [shards[name].path for name in sorted(shards)]
        self.shapes = {name: shard.shapes[name] for name, shard in self._shards.items()}
        self.dtypes = {name: shard.dtypes[name] for name, shard in self._shards.items()}

    def __getitem__(self, name: str) -> np.ndarray:
        """The tensor, read-only; its pages are read when touched."""
        return self._shards[name][name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._shards)

    def __len__(self) -> int:
        return len(self._shards)


def is_shard(path: Path) -> bool:
    """True if a file's name is that of one shard of several."""
    found = _SHARD.fullmatch(path.name)
    return bool(found) and int(found["count"]) > 1


def open_weights(path: str | Path) -> SafetensorsFile | ShardedSafetensors | TorchFile:
    """Opens a checkpoint: a safetensors file, its index, a folder that holds one, or a `.pth`.

    Raises:
        ValueError: none of these, or more than one in the folder; `BrokenFile` if it is not whole.
    """
    path = Path(path)
    if path.is_dir():
        found = sorted(path.glob("*.safetensors.index.json")) or sorted(path.glob("*.safetensors"))
        if len(found) != 1:
            raise ValueError(
                f"{path} holds {len(found)} checkpoints {[file.name for file in found]}; "
                "name the file to read."
            )
        path = found[0]
    if path.name.endswith(".index.json"):
        return ShardedSafetensors(path)
    if is_shard(path):
        raise BrokenFile(
            f"{path} is one shard of several; name their index, "
            f"{_SHARD.fullmatch(path.name)[1]}.safetensors.index.json, and download it if it is "
            "missing."
        )
    check_whole(path)
    if path.suffix == ".safetensors":
        return SafetensorsFile(path)
    if path.suffix in (".pth", ".pt", ".bin"):
        return TorchFile(path)
    raise ValueError(f"{path}: expected .safetensors, .safetensors.index.json, .pth, .pt or .bin")

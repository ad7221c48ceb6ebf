"""Weight files as lazy mappings: names and shapes at once, arrays when asked for."""

import json
import math
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path

import ml_dtypes
import numpy as np

from conversion.torch_file import TorchFile

__all__ = ["SAFETENSORS_NAMES", "SafetensorsFile", "ShardedSafetensors", "open_weights"]

_DTYPES = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "F8_E5M2": ml_dtypes.float8_e5m2,
    "I64": np.int64,
    "I32": np.int32,
    "I16": np.int16,
    "I8": np.int8,
    "U64": np.uint64,
    "U32": np.uint32,
    "U16": np.uint16,
    "U8": np.uint8,
    "BOOL": np.bool_,
}


SAFETENSORS_NAMES = {np.dtype(dtype): name for name, dtype in _DTYPES.items()}
"""Type -> what safetensors calls it."""


class SafetensorsFile(Mapping):
    """One safetensors file: name -> array, mapped from disk.

    Attributes:
        metadata: the header's strings.
        shapes: name -> shape, without reading the tensor.
        dtypes: name -> type, likewise.
        files: that are read.
    """

    def __init__(self, path: str | Path):
        """Reads the header.

        Raises:
            ValueError: the file is cut off or not safetensors.
        """
        self.path = Path(path)
        self.files = [self.path]
        size = self.path.stat().st_size
        try:
            with open(self.path, "rb") as file:
                (length,) = struct.unpack("<Q", file.read(8))
                if length > size - 8:
                    raise ValueError("the header is longer than the file")
                header = json.loads(file.read(length))
            self.metadata: dict[str, str] = header.pop("__metadata__", {})
            self._start = 8 + length
            self._entries = {name: self._checked(entry, size) for name, entry in header.items()}
        except (struct.error, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{self.path} is not a readable safetensors file ({error}); copy it again."
            ) from error
        self.shapes = {name: shape for name, (_, shape, _) in self._entries.items()}
        self.dtypes = {name: dtype for name, (dtype, _, _) in self._entries.items()}

    def _checked(self, entry: dict, size: int) -> tuple[np.dtype, tuple[int, ...], int]:
        dtype, shape = np.dtype(_DTYPES[entry["dtype"]]), tuple(entry["shape"])
        begin, end = entry["data_offsets"]
        if end - begin != math.prod(shape) * dtype.itemsize or self._start + end > size:
            raise ValueError(f"{shape} {dtype} does not fit bytes {begin}..{end}")
        return dtype, shape, begin

    def __getitem__(self, name: str) -> np.ndarray:
        """The tensor, read-only; its pages are read when touched."""
        dtype, shape, begin = self._entries[name]
        if not math.prod(shape):
            return np.zeros(shape, dtype)
        return np.memmap(self.path, dtype, "r", self._start + begin, shape)

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)


class ShardedSafetensors(Mapping):
    """A checkpoint in several files with an index, `*.safetensors.index.json`."""

    def __init__(self, index: str | Path):
        """Opens every shard that the index names.

        Raises:
            ValueError: a shard lacks a tensor that the index promises, or is unreadable.
        """
        index = Path(index)
        places = json.loads(index.read_text())["weight_map"]
        shards = {name: SafetensorsFile(index.parent / name) for name in set(places.values())}
        missing = sorted(name for name, shard in places.items() if name not in shards[shard])
        if missing:
            raise ValueError(f"{index}: the shards lack {missing}; download them again.")
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


def open_weights(path: str | Path) -> SafetensorsFile | ShardedSafetensors | TorchFile:
    """Opens a checkpoint: a safetensors file, its index, a folder that holds one, or a `.pth`.

    Raises:
        ValueError: none of these, or more than one in the folder.
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
    if path.suffix == ".safetensors":
        return SafetensorsFile(path)
    if path.suffix in (".pth", ".pt", ".bin"):
        return TorchFile(path)
    raise ValueError(f"{path}: expected .safetensors, .safetensors.index.json, .pth, .pt or .bin")

"""Safetensors files as lazy mappings: names and shapes at once, arrays on access.

Not `safetensors.safe_open`, which cannot read float8 tensors as NumPy arrays: versions 0.5.0 and
0.8.0 raise `AttributeError: module 'numpy' has no attribute 'float8_e4m3fn'`.
"""

import itertools
import json
import math
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from jax_avatar.weights.whole_file import BrokenFile, check_whole, content_kind

__all__ = ["SAFETENSORS_NAMES", "SafetensorsFile"]

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
_MOST_HEADER_BYTES = 100_000_000  # as of the format's own library


SAFETENSORS_NAMES = {np.dtype(dtype): name for name, dtype in _DTYPES.items()}
"""Type -> its name in safetensors."""


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
            BrokenFile: the file is cut off, not safetensors, or its header is damaged.
        """
        self.path = Path(path)
        self.files = [self.path]
        size = check_whole(self.path)
        try:
            with open(self.path, "rb") as file:
                (length,) = struct.unpack("<Q", file.read(8))
                if length > min(size - 8, _MOST_HEADER_BYTES):
                    raise ValueError(f"its header would have {length} bytes, the file has {size}")
                header = json.loads(file.read(length))
            self.metadata = _strings(header.pop("__metadata__", {}))
            self._start = 8 + length
            self._entries = {name: _entry(name, entry) for name, entry in header.items()}
        except (
            struct.error, ValueError, KeyError, TypeError, AttributeError, OverflowError,
            RecursionError,
        ) as error:  # fmt: skip
            kind = content_kind(self.path)
            raise BrokenFile(
                f"{self.path} is {kind}."
                if kind
                else f"{self.path} is not a readable safetensors file ({error}); its header is "
                "damaged: download or copy it again."
            ) from error
        self._check_size(size)
        self.shapes = {name: shape for name, (_, shape, _, _) in self._entries.items()}
        self.dtypes = {name: dtype for name, (dtype, _, _, _) in self._entries.items()}

    def _check_size(self, size: int) -> None:
        places = sorted((begin, end, name) for name, (_, _, begin, end) in self._entries.items())
        for (_, end, name), (begin, _, following) in itertools.pairwise([(0, 0, ""), *places]):
            if begin != end:
                raise BrokenFile(
                    f"{self.path}: tensor {following} begins at byte {begin} and the one before, "
                    f"{name}, ends at {end}; the header is damaged: download or copy it again."
                )
        expected = self._start + (places[-1][1] if places else 0)
        if size < expected:
            raise BrokenFile(
                f"{self.path} is cut off: it has {size} bytes, its header expects {expected}; "
                "download or copy it again."
            )
        if size > expected:
            raise BrokenFile(
                f"{self.path} has {size} bytes, its header expects {expected}; download or copy "
                "it again."
            )

    def __getitem__(self, name: str) -> np.ndarray:
        """The tensor, read-only; its pages are read when touched."""
        dtype, shape, begin, _ = self._entries[name]
        if not math.prod(shape):
            return np.zeros(shape, dtype)
        return np.memmap(self.path, dtype, "r", self._start + begin, shape)

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)


def _strings(metadata: Any) -> dict[str, str]:
    if not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError("__metadata__ holds something else than strings")
    return metadata


def _entry(name: str, entry: dict) -> tuple[np.dtype, tuple[int, ...], int, int]:
    dtype, shape, places = np.dtype(_DTYPES[entry["dtype"]]), entry["shape"], entry["data_offsets"]
    numbers = [*shape, *places]
    if any(type(number) is not int or number < 0 for number in numbers):
        raise ValueError(f"{name} has shape {shape} at {places}")
    begin, end = places
    if end - begin != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"{name}, {tuple(shape)} {dtype}, does not fit bytes {begin}..{end}")
    return dtype, tuple(shape), begin, end

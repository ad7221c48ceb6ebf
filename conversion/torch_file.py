"""Reads PyTorch's `.pth` and `.bin` weight files without PyTorch and without unpickling.

Such a file is a zip archive: raw tensor storages beside a pickle that says which tensor is a view
of which storage. The pickle is read as data here. Nothing it names is imported or called; of the
calls it describes only those that make tensors and dictionaries are understood, and anything else
is an error.
"""

import math
import pickletools
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from jax_avatar.weights.whole_file import BrokenFile

__all__ = ["TorchFile"]

_STORAGES = {
    "torch DoubleStorage": np.float64,
    "torch FloatStorage": np.float32,
    "torch HalfStorage": np.float16,
    "torch BFloat16Storage": ml_dtypes.bfloat16,
    "torch LongStorage": np.int64,
    "torch IntStorage": np.int32,
    "torch ShortStorage": np.int16,
    "torch CharStorage": np.int8,
    "torch ByteStorage": np.uint8,
    "torch BoolStorage": np.bool_,
}
_MARK = object()
_DAMAGE = (
    zipfile.BadZipFile, zlib.error, struct.error, ValueError, KeyError, IndexError, TypeError,
    AttributeError, EOFError, OverflowError, RecursionError, RuntimeError, OSError,
)  # fmt: skip
"""What a damaged archive or pickle makes the libraries raise."""


@dataclass(frozen=True)
class _Global:
    name: str


@dataclass(frozen=True)
class _Storage:
    dtype: np.dtype
    key: str


@dataclass(frozen=True)
class _Tensor:
    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class TorchFile(Mapping):
    """Weights of one `.pth` file: name -> array, each read on access.

    Attributes:
        shapes: name -> shape, without reading the tensor.
        dtypes: name -> type, likewise.
        files: that are read.
    """

    def __init__(self, path: str | Path):
        """Reads the table of tensors.

        Raises:
            ValueError: not a zip archive of PyTorch 1.6 or later, or not just tensors.
        """
        self.path = Path(path)
        self.files = [self.path]
        try:
            self._archive = zipfile.ZipFile(self.path)
            (table,) = (name for name in self._archive.namelist() if name.endswith("/data.pkl"))
            self._root = table.removesuffix("data.pkl")
            value = _read(self._archive.read(table))
        except _DAMAGE as error:
            raise ValueError(
                f"{self.path} is not a readable file of weights ({error}); a file saved by PyTorch "
                "1.6 or later is expected. Convert it to safetensors if it is another kind."
            ) from error
        if isinstance(value, dict) and isinstance(value.get("state_dict"), dict):
            value = value["state_dict"]
        wrong = not isinstance(value, dict) or [
            name for name, tensor in value.items() if not isinstance(tensor, _Tensor)
        ]
        if wrong:
            raise ValueError(
                f"{self.path}: expected a dictionary of tensors, but "
                f"{'it is none' if wrong is True else f'{wrong[:5]} are not tensors'}."
            )
        self._tensors: dict[str, _Tensor] = value
        self._storages: dict[str, np.ndarray] = {}  # by the key of those that were checked
        self.shapes = {name: tensor.shape for name, tensor in value.items()}
        self.dtypes = {name: tensor.storage.dtype for name, tensor in value.items()}

    def __getitem__(self, name: str) -> np.ndarray:
        """The tensor, read-only."""
        tensor = self._tensors[name]
        storage = self._checked(tensor.storage)
        if not math.prod(tensor.shape):
            return np.zeros(tensor.shape, storage.dtype)
        reach = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.strides, strict=True))
        if min(tensor.offset, *tensor.strides, 0) < 0 or tensor.offset + reach >= storage.size:
            raise ValueError(f"{self.path}: {name} reaches outside its storage; copy it again.")
        strides = [stride * storage.itemsize for stride in tensor.strides]
        return np.lib.stride_tricks.as_strided(
            storage[tensor.offset :], tensor.shape, strides, writeable=False
        )

    def _checked(self, storage: _Storage) -> np.ndarray:
        """A storage whose bytes have the checksum that the archive has of them."""
        if storage.key not in self._storages:
            try:
                data = self._map(storage)
                entry = self._archive.getinfo(f"{self._root}data/{storage.key}")
                whole = data.nbytes == entry.file_size
            except _DAMAGE as error:
                raise BrokenFile(
                    f"{self.path}: storage {storage.key} cannot be read ({error}); download or "
                    "copy it again."
                ) from error
            if not whole or zlib.crc32(data.view(np.uint8).data) != entry.CRC:
                raise BrokenFile(
                    f"{self.path}: storage {storage.key} is damaged (its checksum differs); "
                    "download or copy it again."
                )
            self._storages[storage.key] = data
        return self._storages[storage.key].view(storage.dtype)

    def _map(self, storage: _Storage) -> np.ndarray:
        """A storage's numbers; PyTorch does not compress them, so their pages come when touched."""
        entry = self._archive.getinfo(f"{self._root}data/{storage.key}")
        if entry.compress_type != zipfile.ZIP_STORED or not entry.file_size:
            return np.frombuffer(self._archive.read(entry), storage.dtype)
        with open(self.path, "rb") as file:
            file.seek(entry.header_offset)
            head = file.read(30)
        if head[:4] != b"PK\x03\x04":
            raise ValueError(f"{self.path}: storage {storage.key} is not where it should be.")
        names = int.from_bytes(head[26:28], "little") + int.from_bytes(head[28:30], "little")
        count = entry.file_size // storage.dtype.itemsize
        start = entry.header_offset + 30 + names
        if start + entry.file_size > self.path.stat().st_size:
            raise ValueError(f"{self.path} is cut off in storage {storage.key}; copy it again.")
        return np.memmap(self.path, storage.dtype, "r", start, (count,))

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


def _read(data: bytes) -> Any:
    """Follows a pickle's instructions on a stack of plain values."""
    stack, memo = _Stack(), {}
    for opcode, argument, _ in pickletools.genops(data):
        name = opcode.name
        if name in ("PROTO", "FRAME"):
            continue
        if name == "STOP":
            return stack.pop()
        if name in _LITERALS:
            stack.append(argument)
        elif name in ("BINPUT", "LONG_BINPUT"):
            memo[argument] = stack[-1]
        elif name == "MEMOIZE":
            memo[len(memo)] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(memo[argument])
        elif name == "GLOBAL":
            stack.append(_Global(argument))
        elif name in _PUSHES:
            stack.append(_PUSHES[name](stack))
        elif name in _CHANGES:
            _CHANGES[name](stack)
        else:
            raise ValueError(f"pickle instruction {name} has no place in a file of weights")
    raise ValueError("the pickle has no end")


class _Stack(list):
    """Values of a pickle under way."""

    def take(self, count: int) -> list[Any]:
        """The last values, removed."""
        values = self[-count:]
        del self[-count:]
        return values

    def since_mark(self) -> list[Any]:
        """The values after the last mark, removed with it."""
        at = max(i for i, value in enumerate(self) if value is _MARK)
        values = self[at + 1 :]
        del self[at:]
        return values


def _set_items(stack: _Stack, pairs: list[Any]) -> None:
    stack[-1].update(zip(pairs[::2], pairs[1::2], strict=True))


_PUSHES: dict[str, Callable[[_Stack], Any]] = {
    "MARK": lambda stack: _MARK,
    "NONE": lambda stack: None,
    "NEWTRUE": lambda stack: True,
    "NEWFALSE": lambda stack: False,
    "EMPTY_TUPLE": lambda stack: (),
    "EMPTY_LIST": lambda stack: [],
    "EMPTY_DICT": lambda stack: {},
    "TUPLE": lambda stack: tuple(stack.since_mark()),
    "TUPLE1": lambda stack: tuple(stack.take(1)),
    "TUPLE2": lambda stack: tuple(stack.take(2)),
    "TUPLE3": lambda stack: tuple(stack.take(3)),
    "STACK_GLOBAL": lambda stack: _Global(" ".join(stack.take(2))),
    "BINPERSID": lambda stack: _storage(stack.pop()),
    "REDUCE": lambda stack: _make(*stack.take(2)),
}
_CHANGES: dict[str, Callable[[_Stack], None]] = {
    "SETITEM": lambda stack: _set_items(stack, stack.take(2)),
    "SETITEMS": lambda stack: _set_items(stack, stack.since_mark()),
    "APPEND": lambda stack: stack[-2].append(stack.pop()),
    "APPENDS": lambda stack: (values := stack.since_mark(), stack[-1].extend(values)),
    # Attributes of the state dictionary itself, such as its `_metadata`: not weights.
    "BUILD": lambda stack: stack.pop(),
}
_LITERALS = (
    "BININT",
    "BININT1",
    "BININT2",
    "LONG1",
    "BINFLOAT",
    "BINUNICODE",
    "SHORT_BINUNICODE",
    "BINUNICODE8",
)


def _storage(identity: Any) -> _Storage:
    kind, dtype, key, _, _ = identity
    if kind != "storage" or not isinstance(dtype, _Global) or dtype.name not in _STORAGES:
        raise ValueError(f"storage {identity!r} is not known")
    return _Storage(np.dtype(_STORAGES[dtype.name]), key)


def _make(function: Any, arguments: tuple) -> Any:
    """The value of a call that the file describes, for the few calls that make weights."""
    name = function.name if isinstance(function, _Global) else repr(function)
    if name == "collections OrderedDict":
        return dict(*arguments)
    if name == "torch._utils _rebuild_parameter":
        return arguments[0]
    if name == "torch._utils _rebuild_tensor_v2":
        storage, offset, shape, strides, *_ = arguments
        if not isinstance(storage, _Storage) or len(shape) != len(strides):
            raise ValueError("a tensor without a storage, or with strides of another length")
        if any(type(number) is not int or number < 0 for number in (offset, *shape, *strides)):
            raise ValueError("a tensor whose place or shape is no whole number")
        return _Tensor(storage, offset, tuple(shape), tuple(strides))
    raise ValueError(f"the file asks to call {name}; only tensors and dictionaries are read")

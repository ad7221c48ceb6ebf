"""Plain values of a file or a command line <-> a dataclass, each in the type of its field."""

import difflib
import math
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, asdict, fields
from typing import Any, TypeVar

import numpy as np

__all__ = ["fill_fields", "plain_fields"]

Settings = TypeVar("Settings")
_LARGEST = 2**53  # beyond which no setting makes sense, and JAX's integers end soon after


def fill_fields(kind: type[Settings], values: Mapping[str, Any], place: str) -> Settings:
    """A dataclass with values as JSON, a config file or a command line has them.

    Args:
        kind: the dataclass.
        values: of its fields.
        place: where they are written, before the name of a field in messages.

    Raises:
        ValueError: for a key that the dataclass lacks, naming the nearest one it has, for a value
            of another type, for one that is missing, or as the dataclass itself.
    """
    known = {field.name: field.type for field in fields(kind)}
    checked = {}
    for key, value in values.items():
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(known)}"
            raise ValueError(
                f"{place}.{key} is not a setting of {kind.__name__}: {key!r} is unknown; {hint}"
            )
        checked[key] = _of_type(known[key], value, f"{place}.{key}")
    lacking = [
        field.name
        for field in fields(kind)
        if field.name not in values
        and field.default is MISSING
        and field.default_factory is MISSING
    ]
    if lacking:
        raise ValueError(f"{place} lacks {', '.join(lacking)}; give a value.")
    try:
        made = kind(**checked)
    except (TypeError, ArithmeticError, SyntaxError) as error:  # as 0 heads, or a type of numbers
        raise ValueError(f"{place}: values that cannot be used came ({error}).") from error
    # A number alone is a size, a count, a rate, a weight or a share; those of a sequence may be
    # less, as the means of latents are.
    for key, value in checked.items():
        if isinstance(value, int | float) and not 0 <= value <= _LARGEST:
            raise ValueError(f"{place}.{key}: {value!r} came, expected 0 to {_LARGEST:g}.")
    return made


def plain_fields(settings: Any) -> dict[str, Any]:
    """Fields of a dataclass as plain values, for JSON or a config file; types by their names."""
    values = asdict(settings)
    return {k: str(v) if isinstance(v, np.dtype) else v for k, v in values.items()}


def _of_type(kind: Any, value: Any, name: str) -> Any:
    """A value in the type of its field, where that is a plain one or made of plain ones."""
    if isinstance(value, list):
        value = tuple(value)
    origin, inside = typing.get_origin(kind), typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):
        for one in inside:
            if one is str and type(value) is not str:  # among others, a number is no text
                continue
            try:
                return _of_type(one, value, name)
            except ValueError:
                continue
        raise _wrong(kind, value, name)
    if origin in (tuple, Sequence):
        if not isinstance(value, tuple):
            raise _wrong(kind, value, name)
        items = [one for one in inside if one is not Ellipsis]
        items = items if len(items) > 1 else items * len(value)
        if len(items) != len(value):
            raise _wrong(kind, value, name)
        return tuple(_of_type(*pair, name) for pair in zip(items, value, strict=True))
    if kind not in (bool, int, float, str, types.NoneType):
        return value
    return _plain(kind, value, name)


def _plain(kind: type, value: Any, name: str) -> Any:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if is_number and not math.isfinite(value):
        raise ValueError(f"{name}: {value!r} came, expected a finite number.")
    if type(value) is kind:
        return value
    if kind is float and is_number:
        return float(value)
    if kind is int and is_number and float(value).is_integer():
        return int(value)
    if kind is str and type(value) is int:  # --config.loop.mesh=2
        return str(value)
    raise _wrong(kind, value, name)


def _wrong(kind: Any, value: Any, name: str) -> ValueError:
    wanted = kind.__name__ if isinstance(kind, type) else str(kind).replace("collections.abc.", "")
    return ValueError(f"{name}: {value!r} came, expected a value of type {wanted}.")

"""Recorder of intermediate values, for comparison with other code.

    with record() as taps:
        out = dit.bidirectional(noisy, timestep, conditions)
    taps["block0_out"]

Values are recorded while tracing: within a compiled function, record there and return the taps with
the result. Layers are unrolled while a recorder is open, since a value of a scan's body means
nothing outside.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from jax_avatar.shapes import Array

__all__ = ["is_recording", "record", "tap", "tap_prefix"]

_taps: ContextVar[dict[str, Any] | None] = ContextVar("taps", default=None)
_prefix: ContextVar[str] = ContextVar("prefix", default="")


@contextmanager
def record() -> Iterator[dict[str, Any]]:
    """Collects the values of all `tap` calls inside, by name."""
    taps: dict[str, Any] = {}
    with _set(_taps, taps), _set(_prefix, ""):
        yield taps


def is_recording() -> bool:
    """True inside `record`."""
    return _taps.get() is not None


def tap(name: str, value: Array) -> None:
    """Records a value; does nothing outside `record`."""
    if (taps := _taps.get()) is not None:
        taps[_prefix.get() + name] = value


def tap_prefix(prefix: str):
    """A context whose taps have this prefix, in place of any other."""
    return _set(_prefix, prefix)


@contextmanager
def _set(variable: ContextVar, value: Any) -> Iterator[None]:
    token = variable.set(value)
    try:
        yield
    finally:
        variable.reset(token)

"""What every command does at its console: quiet pipes, finite numbers."""

import argparse
import contextlib
import math
import os
import sys
from typing import Any

__all__ = ["check_finite", "finite", "outlive_readers"]


class _Outlives:
    """A text stream whose reader may leave: what is written after that is dropped."""

    def __init__(self, stream: Any):
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        with self._left_alone():
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with self._left_alone():
            self._stream.flush()

    @contextlib.contextmanager
    def _left_alone(self):
        try:
            yield
        except BrokenPipeError:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)


def outlive_readers() -> None:
    """Lets the command finish its work where the reader of its output leaves (`... | head -1`)."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if not isinstance(stream, _Outlives):
            setattr(sys, name, _Outlives(stream))


def check_finite(flags: Any) -> None:
    """Refuses numbers that are none.

    Args:
        flags: absl's `FLAGS`, parsed.

    Raises:
        ValueError: a flag is infinite or NaN.
    """
    for name in flags:
        value = flags[name].value
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"--{name} {value}: expected a finite number.")


def finite(text: str) -> float:
    """A number for argparse, neither infinite nor NaN."""
    value = float(text)
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"{text}: expected a finite number")
    return value

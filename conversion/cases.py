"""Interface between `conversion.verify` and the kinds of golden cases.

A kind looks through the data files of one folder, says which of them it understands as cases, and
runs a case tensor by tensor. Nothing is known by file name beyond the documented format: sizes
come from the metadata or from the tensors themselves.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np

from conversion.readers import SafetensorsFile

__all__ = ["Case", "Check", "Kind", "compare", "weight_pairs"]


@dataclass(frozen=True)
class Case:
    """Files that are verified together.

    Attributes:
        name: shown in the table.
        files: every file that this case reads; files in no case are reported as unknown.
        data: whatever the kind's `run` needs besides.
    """

    name: str
    files: tuple[Path, ...]
    data: Any = None


@dataclass(frozen=True)
class Check:
    """Verdict on one tensor.

    Attributes:
        tensor: its name in the file.
        error: absolute error of the worst element; infinite if there is nothing to compare.
        tolerance: what is allowed there.
        note: why, where a number does not say it.
    """

    tensor: str
    error: float
    tolerance: float
    note: str = ""

    @property
    def passed(self) -> bool:
        """True if the error is finite and within the tolerance."""
        return bool(self.error <= self.tolerance)


@runtime_checkable
class Kind(Protocol):
    """One family of golden files."""

    name: str

    def find(self, files: Sequence[Path]) -> list[Case]:
        """Cases among the `.safetensors` and `.json` files of one folder, all of them readable."""

    def run(self, case: Case) -> Iterable[Check]:
        """One check per tensor, including a failing one for a tensor it does not know."""


def weight_pairs(files: Sequence[Path], keys: set[str]) -> list[Case]:
    """Pairs `<stem>_weights.safetensors` and `<stem>_io.safetensors` of one network.

    Args:
        files: of one folder.
        keys: that the official constructor arguments have, in the metadata key `config`.
    """
    cases = []
    for weights in files:
        stem = weights.name.removesuffix("_weights.safetensors")
        io = weights.with_name(f"{stem}_io.safetensors")
        if stem != weights.name and io in files:
            config = json.loads(SafetensorsFile(weights).metadata.get("config", "{}"))
            if keys <= set(config):
                cases.append(Case(stem, (weights, io)))
    return cases


def compare(tensor: str, actual: Any, expected: Any, atol: float, rtol: float = 0.0) -> Check:
    """Compares element by element; exact with tolerance 0.

    Args:
        tensor: name for the report.
        actual: what we computed.
        expected: what the file holds.
        atol: allowed absolute error.
        rtol: allowed on top of it, relative to the expected value.
    """
    actual, expected = np.asarray(actual), np.asarray(expected)
    if actual.shape != expected.shape:
        note = f"shape {actual.shape}, expected {expected.shape}"
        return Check(tensor, np.inf, atol, note)
    if not expected.size:
        return Check(tensor, 0.0, atol)
    expected = expected.astype(np.float64)
    error = np.abs(actual.astype(np.float64) - expected)
    allowed = atol + rtol * np.abs(expected)
    worst = np.argmax(np.where(np.isnan(error), np.inf, error - allowed))
    note = "not a number" if np.isnan(error.flat[worst]) else ""
    return Check(tensor, float(error.flat[worst]), float(allowed.flat[worst]), note)

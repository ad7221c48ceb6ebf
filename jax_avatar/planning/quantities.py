"""Planned quantities with their provenance (compiled, computed).

compiled   by the compiler, from the real step           temporaries, operations
computed   from shapes, formulas and published peaks     weights, windows, bounds
measured   on the device; nothing in a plan is
"""

from collections.abc import Mapping
from dataclasses import dataclass

__all__ = ["DeviceUse", "Figure", "Needs", "total_bytes"]


@dataclass(frozen=True)
class Figure:
    """A number and where it is from: "compiled", "computed" or "measured"."""

    value: float
    source: str


@dataclass(frozen=True)
class DeviceUse:
    """Contents of a device's memory, in bytes.

    Attributes:
        role: what the device does.
        count: devices of that role.
        bytes: by what they hold.
        limit: memory of the device; 0 if unknown.
        refused: why the compiler could not, if so.
    """

    role: str
    count: int
    bytes: dict[str, Figure]
    limit: float
    refused: str = ""

    @property
    def total(self) -> float:
        """All bytes."""
        return total_bytes(self.bytes)

    @property
    def fits(self) -> bool:
        """True if the program compiles and fits, False if not, None if unknown."""
        return not self.refused and (not self.limit or self.total <= self.limit)


@dataclass(frozen=True)
class Needs:
    """Device requirements of a task, as `launch/plan.py` reports them.

    Attributes:
        compiled_for: "tpu v5p:2x2x2", or "cpu" for stand-ins.
        devices: by role.
        figures: operations, bounds on times and rates; empty of bounds where no peak is known.
        fps: wanted frames per second; 0 if the task is no stream.
        advice: what to change if something does not fit or is too slow.
        compile_s: seconds that compiling took, by part.
        remarks: what to know when reading the numbers.
    """

    compiled_for: str
    devices: tuple[DeviceUse, ...]
    figures: dict[str, Figure]
    fps: int
    advice: tuple[str, ...]
    compile_s: dict[str, float]
    remarks: tuple[str, ...] = ()

    @property
    def fits(self) -> bool:
        """True if every device has room, None if unknown."""
        return all(device.fits for device in self.devices)


def total_bytes(figures: Mapping[str, Figure]) -> float:
    """Their sum."""
    return float(sum(figure.value for figure in figures.values()))

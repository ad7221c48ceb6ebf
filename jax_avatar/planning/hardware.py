"""Published peak rates of devices, and stand-ins to compile for them.

Peaks are of dense arithmetic, per device as JAX counts devices: a v7x chip is two of them.
"""

import importlib.util
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax

__all__ = ["HARDWARE", "Hardware", "find_hardware", "has_tpu_compiler", "recognise", "stand_ins"]

_CLOUD = "cloud.google.com/tpu/docs"
_NVIDIA = "nvidia.com, data sheet of the SXM module"


@dataclass(frozen=True)
class Hardware:
    """Published peaks of one device.

    Attributes:
        name: as given to `--hardware`.
        platform: "tpu", "gpu" or "cpu".
        tflops: peak TFLOP/s by weight type: bf16, int8 (TOP/s), fp8; a type that the device
            cannot multiply is computed in bf16.
        memory_gb: memory in 10^9 bytes; 0 if it is the machine's.
        bandwidth_gb_s: of that memory, in 10^9 bytes per second.
        source: where the numbers are from.
        topologies: slices to compile for, smallest first, in the TPU compiler's names.
    """

    name: str
    platform: str
    tflops: dict[str, float]
    memory_gb: float
    bandwidth_gb_s: float
    source: str
    topologies: tuple[str, ...] = ()

    def peak(self, dtype: str) -> float:
        """FLOP/s of products with weights of a type."""
        return 1e12 * self.tflops.get(dtype, self.tflops.get("bf16", 0.0))


def _square(name: str) -> tuple[str, ...]:
    return tuple(f"{name}:{size}" for size in ("2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16"))


def _cube(name: str) -> tuple[str, ...]:
    sizes = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8")
    return tuple(f"{name}:{size}" for size in sizes)


def _gpu(name: str, memory_gb: float, bandwidth_gb_s: float) -> Hardware:
    # The three have the same processor; sparsity, which the data sheets count, is left out.
    tflops = {"bf16": 989.5, "fp8": 1979.0, "int8": 1979.0}
    return Hardware(name, "gpu", tflops, memory_gb, bandwidth_gb_s, f"{_NVIDIA} {name.upper()}")


HARDWARE: dict[str, Hardware] = {
    hardware.name: hardware
    for hardware in (
        _gpu("h100", 80.0, 3350.0),
        _gpu("h200", 141.0, 4800.0),
        _gpu("h800", 80.0, 3350.0),
        Hardware(
            "v5e",
            "tpu",
            {"bf16": 197.0, "int8": 394.0},
            16.0,
            819.0,
            f"{_CLOUD}/v5e",
            _square("v5e"),
        ),
        Hardware(
            "v5p",
            "tpu",
            {"bf16": 459.0, "int8": 918.0},
            95.0,
            2765.0,
            f"{_CLOUD}/v5p",
            _cube("v5p"),
        ),
        Hardware(
            "v6e",
            "tpu",
            {"bf16": 918.0, "int8": 1836.0},
            32.0,
            1640.0,
            f"{_CLOUD}/v6e",
            _square("v6e"),
        ),
        Hardware(
            "v7x",
            "tpu",
            {"bf16": 1153.5, "fp8": 2307.0},
            96.0,
            3690.0,
            f"{_CLOUD}/tpu7x, half a chip",
            _cube("tpu7x"),
        ),
        Hardware("cpu", "cpu", {}, 0.0, 0.0, "this machine; nothing is published"),
    )
}
"""Devices by name."""


def find_hardware(name: str) -> Hardware:
    """A device by name.

    Raises:
        ValueError: an unknown one.
    """
    if name not in HARDWARE:
        raise ValueError(f"--hardware {name} is unknown; known are {', '.join(HARDWARE)}.")
    return HARDWARE[name]


_KINDS = {
    "NVIDIA H100 80GB HBM3": "h100",
    "NVIDIA H200": "h200",
    "NVIDIA H800": "h800",
    "TPU v5 lite": "v5e",
    "TPU v5e": "v5e",
    "TPU v5": "v5p",
    "TPU v5p": "v5p",
    "TPU v6 lite": "v6e",
    "TPU v6e": "v6e",
    "TPU7x": "v7x",
}


def recognise(device_kind: str) -> Hardware | None:
    """Hardware of a device kind as JAX reports it; None if its peaks are unknown."""
    name = _KINDS.get(device_kind)
    return HARDWARE[name] if name else None


def has_tpu_compiler() -> bool:
    """True if the TPU compiler is installed; it needs no TPU."""
    return importlib.util.find_spec("libtpu") is not None


# The TPU's compiler without a TPU: it is not to look for one, nor to wait for answers about it.
_COMPILER_ALONE = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5p-8",  # of no consequence, but asked for
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


def stand_ins(
    hardware: Hardware, take: Callable[[Sequence[jax.Device]], Any]
) -> tuple[Sequence[jax.Device], str]:
    """Devices to compile for where the real ones are not at hand.

    Args:
        hardware: to plan for.
        take: raises a `ValueError` where the devices are too few, as `make_mesh` does.

    Returns:
        The devices, and what they are: "tpu v5p:2x2x2" or "cpu".

    Raises:
        ValueError: no slice of that hardware is large enough.
    """
    if hardware.platform != "tpu" or not has_tpu_compiler():
        return jax.devices("cpu"), "cpu"
    from jax.experimental import topologies

    for variable, value in _COMPILER_ALONE.items():
        os.environ.setdefault(variable, value)
    wrong = None
    for name in hardware.topologies:
        devices = topologies.get_topology_desc(platform="tpu", topology_name=name).devices
        try:
            take(devices)
        except ValueError as error:
            wrong = error
        else:
            return devices, f"tpu {name}"
    raise ValueError(f"{hardware.name}, slices up to {hardware.topologies[-1]}: {wrong}")

"""From `--mesh` and a number of denoising steps to devices: which slice runs which steps.

"5"       4 denoising slices and the VAE on a fifth
"4"       4 denoising slices, the VAE shares the last
"3"       2 slices of two steps each, and the VAE
"2"       2 slices of two steps each, the VAE shares the last
"1"       everything in turn on one device (Algorithm 3)
"4x2+1"   4 denoising slices of 2 devices each, and one device for the VAE
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import jax
import numpy as np
from jax.experimental.layout import Format
from jax.experimental.layout import Layout as MemoryLayout
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

__all__ = ["Layout", "batch_place", "cache_place", "make_mesh", "parse_layout"]


@dataclass(frozen=True)
class Layout:
    """Layout of a stream over devices.

    Attributes:
        stages: slices that denoise, each one or more consecutive steps.
        stage_devices: devices per slice.
        has_vae_slice: whether the VAE has a device of its own; else it shares the last slice.
        steps_per_stage: denoising steps of a slice.
    """

    stages: int
    stage_devices: int
    has_vae_slice: bool
    steps_per_stage: int

    @property
    def num_devices(self) -> int:
        """Devices in all."""
        return self.stages * self.stage_devices + self.has_vae_slice

    @property
    def is_sequential(self) -> bool:
        """One device does everything in turn."""
        return self.num_devices == 1


def parse_layout(mesh: str, num_steps: int) -> Layout:
    """Reads the `--mesh` argument.

    Args:
        mesh: "N", or "STAGESxDEVICES+1" where either part after STAGES may be missing.
        num_steps: denoising steps of the schedule.

    Raises:
        ValueError: if the steps do not spread evenly over the slices.
    """
    text = str(mesh).replace(" ", "")
    if re.fullmatch(r"\d+", text):
        return _from_count(int(text), num_steps)
    match = re.fullmatch(r"(\d+)(?:x(\d+))?(?:\+(\d+))?", text)
    if not match:
        raise ValueError(
            f"--mesh {mesh}: expected a number of slices such as 5, or STAGESxDEVICES+VAE such as "
            "4x2+1."
        )
    stages, devices, vae = (int(group) if group is not None else None for group in match.groups())
    devices, vae = 1 if devices is None else devices, vae or 0
    if devices < 1:
        raise ValueError(f"--mesh {mesh}: a slice needs at least one device; write x1 or more.")
    if vae > 1:
        raise ValueError(f"--mesh {mesh}: the VAE runs on one device; write +1 or leave it out.")
    if stages < 1 or num_steps % stages:
        raise ValueError(
            f"--mesh {mesh}: {num_steps} timesteps do not spread evenly over {stages} slices; pass "
            f"{_choices(num_steps)} slices before the x."
        )
    return Layout(stages, devices, bool(vae), num_steps // stages)


def _from_count(slices: int, num_steps: int) -> Layout:
    if slices >= 1 and num_steps % slices == 0:
        return Layout(slices, 1, False, num_steps // slices)
    if slices >= 2 and num_steps % (slices - 1) == 0:
        return Layout(slices - 1, 1, True, num_steps // (slices - 1))
    if slices < 1:
        raise ValueError(f"--mesh {slices}: at least one device is needed; pass --mesh 1.")
    divisors = [d for d in range(1, num_steps + 1) if num_steps % d == 0]
    possible = sorted({*divisors, *(d + 1 for d in divisors)})
    raise ValueError(
        f"--mesh {slices}: {num_steps} timesteps and the VAE do not spread over {slices} slices; "
        f"pass --mesh {_either(possible)}, or a model of {slices - 1} or {slices} steps."
    )


def _choices(num_steps: int) -> str:
    return _either([d for d in range(1, num_steps + 1) if num_steps % d == 0])


def _either(numbers: Sequence[int]) -> str:
    *most, last = map(str, numbers)
    return f"{', '.join(most)} or {last}" if most else last


def make_mesh(
    layout: Layout, devices: Sequence[jax.Device] | None = None
) -> tuple[Mesh, jax.Device]:
    """Devices of a layout.

    Args:
        layout: from `parse_layout`.
        devices: candidates in order; all devices if not given.

    Returns:
        A mesh with the axes "stage" and "model", and the VAE's device. The VAE's device shares a
        host with the last slice, so that latents reach it without crossing hosts; where there are
        devices to spare, the first ones are left out for that.

    Raises:
        ValueError: if there are too few devices, or the VAE's would be on another host.
    """
    devices = list(devices if devices is not None else jax.devices())
    if len(devices) < layout.num_devices:
        raise ValueError(
            f"--mesh needs {layout.num_devices} devices, {len(devices)} "
            f"{devices[0].platform.upper()} found; pass --mesh {min(len(devices), 5)} or a layout "
            "with fewer slices."
        )
    count = layout.stages * layout.stage_devices
    start = _first_device(devices, layout)
    grid = np.array(devices[start : start + count]).reshape(layout.stages, layout.stage_devices)
    vae_device = devices[start + count] if layout.has_vae_slice else grid[-1, 0]
    hosts = sorted({device.process_index for device in grid[-1]})
    if vae_device.process_index not in hosts:
        raise ValueError(
            f"the VAE's device {vae_device} is on host {vae_device.process_index}, the last slice "
            f"on host {', '.join(map(str, hosts))}; order the devices so that both share a host, "
            "or leave out the VAE's own slice (--mesh 4)."
        )
    # Explicit axes, the default, would demand shardings of every intermediate value.
    axis_types = (jax.sharding.AxisType.Auto,) * 2
    return Mesh(grid, ("stage", "model"), axis_types=axis_types), vae_device


def batch_place(on: Mesh | jax.Device) -> NamedSharding | SingleDeviceSharding:
    """Where rows of portraits live: on a device, or spread over the "data" axis of a mesh."""
    return (
        NamedSharding(on, PartitionSpec("data"))
        if isinstance(on, Mesh)
        else SingleDeviceSharding(on)
    )


def cache_place(on: Mesh | jax.Device) -> NamedSharding | SingleDeviceSharding | Format:
    """Where windows and sinks live: `[l b s m e]`, on a pipeline's mesh `[stage l b s m e]`.

    On a mesh, heads are split over the "model" axis, on that of a training run portraits over
    "data". On TPUs, memory has the heads before the
    slots, since attention there reads one head after the other: stored slot by slot, a window
    would be rewritten as a whole on the way into every step, and out of it.
    """
    if isinstance(on, Mesh):
        lead, device = int("stage" in on.shape), on.devices.flat[0]
        axes = ("stage", None, None) if lead else (None, "data")
        sharding = NamedSharding(on, PartitionSpec(*axes, None, "model"))
    else:
        lead, device, sharding = 0, on, SingleDeviceSharding(on)
    if device.platform != "tpu":
        return sharding
    order = (*range(lead + 2), lead + 3, lead + 2, lead + 4)
    return Format(MemoryLayout(major_to_minor=order), sharding)


def _first_device(devices: Sequence[jax.Device], layout: Layout) -> int:
    """First index of a layout in `devices`: the VAE should share a host with the last slice."""
    count = layout.stages * layout.stage_devices
    for start in range(len(devices) - layout.num_devices + 1 if layout.has_vae_slice else 0):
        if devices[start + count - 1].process_index == devices[start + count].process_index:
            return start
    return 0

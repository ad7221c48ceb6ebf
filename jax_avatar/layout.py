"""One mesh language: devices of a stream or of training, written as numbers joined by x and +.

Stream (timestep-forcing pipeline): slices x devices of a slice + the VAE's device
"5"       4 denoising slices and the VAE on a fifth
"4"       4 denoising slices, the VAE shares the last
"3"       2 slices of two steps each, and the VAE
"2"       2 slices of two steps each, the VAE shares the last
"1"       everything in turn on one device (Algorithm 3)
"4x2+1"   4 denoising slices of 2 devices each, and one device for the VAE

Training: replicas x data x model
"8x1"     eight devices, each with its own clips and an eighth of the state ("data", FSDP)
"4x2"     four groups with their own clips; in a group, heads and feed-forward are split ("model")
"16x8x1"  sixteen replicas ("replica") of "8x1": state is cut within a replica only, and gradients
          are summed over replicas, so that the network between hosts carries no weights

How weights, activations and caches are cut over such a mesh: `models.sharding`.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import jax
import numpy as np
from jax.sharding import AxisType, Mesh

__all__ = [
    "Layout",
    "TrainingLayout",
    "make_mesh",
    "make_training_mesh",
    "parse_layout",
    "parse_training_layout",
]


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


@dataclass(frozen=True)
class TrainingLayout:
    """Layout of a training run over devices.

    Attributes:
        replicas: copies of the state.
        data: devices of a replica that have clips of their own and share its state.
        model: devices that split the heads and the feed-forward of the same clips.
    """

    replicas: int
    data: int
    model: int

    @property
    def clip_devices(self) -> int:
        """Devices over which the clips of a batch are spread."""
        return self.replicas * self.data

    @property
    def num_devices(self) -> int:
        """Devices in all."""
        return self.clip_devices * self.model

    def __str__(self) -> str:
        sizes = (self.data, self.model)
        return "x".join(map(str, sizes if self.replicas == 1 else (self.replicas, *sizes)))


def parse_layout(mesh: str, num_steps: int) -> Layout:
    """Reads the `--mesh` of a stream.

    Args:
        mesh: "N", or "STAGESxDEVICES+1" where either part after STAGES may be missing.
        num_steps: denoising steps of the schedule.

    Raises:
        ValueError: if the steps do not spread evenly over the slices.
    """
    sizes, vae = _numbers(mesh)
    if len(sizes) == 1 and vae is None:
        return _from_count(sizes[0], num_steps)
    if len(sizes) not in (1, 2):
        raise ValueError(
            f"--mesh {mesh}: expected a number of slices such as 5, or STAGESxDEVICES+VAE such as "
            "4x2+1."
        )
    stages, devices = (*sizes, 1)[:2]
    if devices < 1:
        raise ValueError(f"--mesh {mesh}: a slice needs at least one device; write x1 or more.")
    if (vae or 0) > 1:
        raise ValueError(f"--mesh {mesh}: the VAE runs on one device; write +1 or leave it out.")
    if stages < 1 or num_steps % stages:
        raise ValueError(
            f"--mesh {mesh}: {num_steps} timesteps do not spread evenly over {stages} slices; pass "
            f"{_choices(num_steps)} slices before the x."
        )
    return Layout(stages, devices, bool(vae), num_steps // stages)


def parse_training_layout(mesh: str) -> TrainingLayout:
    """Reads the mesh of training: "REPLICASxDATAxMODEL", "DATAxMODEL" or "DATA".

    Raises:
        ValueError: it is none of them.
    """
    sizes, vae = _numbers(mesh)
    if not 1 <= len(sizes) <= 3 or 0 in sizes or vae is not None:
        raise ValueError(
            f"training mesh {mesh!r}: expected DATAxMODEL devices such as 4x2, a number such as 8, "
            "which is 8x1, or REPLICAxDATAxMODEL such as 16x8x1."
        )
    if len(sizes) == 3:
        return TrainingLayout(*sizes)
    return TrainingLayout(1, sizes[0], sizes[1] if len(sizes) == 2 else 1)


def _numbers(mesh: str) -> tuple[tuple[int, ...], int | None]:
    """The numbers joined by x, none if it is anything else; and that after the +."""
    match = re.fullmatch(r"(\d+(?:x\d+)*)(?:\+(\d+))?", str(mesh).replace(" ", ""), re.ASCII)
    if not match:
        return (), None
    return tuple(map(int, match[1].split("x"))), None if match[2] is None else int(match[2])


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
    return _mesh(grid, ("stage", "model")), vae_device


def make_training_mesh(
    text: str,
    batch_size: int | None,
    *,
    accumulate: int = 1,
    num_heads: int | None = None,
    devices: Sequence[jax.Device] | None = None,
) -> Mesh:
    """The mesh with the axes "data" and "model", and before them "replica" if there are several.

    Args:
        text: as `parse_training_layout` reads it; "" takes all devices for "data" if the clips of a
            micro-batch spread evenly over them, else one.
        batch_size: clips of an update, or None if that is not known beforehand.
        accumulate: micro-batches of an update.
        num_heads: of the transformer, if there is one.
        devices: all devices of all hosts if not given.

    Raises:
        ValueError: devices, clips or heads do not spread evenly.
    """
    devices = list(jax.devices() if devices is None else devices)
    if batch_size is not None and batch_size % accumulate:
        raise ValueError(
            f"loop.accumulate={accumulate} does not divide the batch of {batch_size} clips; choose "
            "a divisor."
        )
    clips = None if batch_size is None else batch_size // accumulate
    if not text:
        text = "1" if clips is None or clips % len(devices) else str(len(devices))
    layout = parse_training_layout(text)
    data, model, taken = layout.clip_devices, layout.model, layout.num_devices
    if taken > len(devices) or len(devices) % taken:
        raise ValueError(
            f"loop.mesh={layout} takes {taken} devices, of {len(devices)} here; "
            f"choose DATAxMODEL whose product divides {len(devices)}."
        )
    if jax.process_count() > 1 and taken != len(devices):
        raise ValueError(
            f"loop.mesh={layout} leaves devices of some hosts idle; take all {len(devices)}, "
            f"for example {len(devices)}x1, with a batch that divides by them."
        )
    if clips is not None and clips % data:
        raise ValueError(
            f"loop.mesh={layout} spreads {clips} clips over {data} devices (a batch of "
            f"{batch_size} in {accumulate} parts); choose a batch that is a multiple of "
            f"{data * accumulate}, or fewer devices for data."
        )
    if num_heads is not None and num_heads % model:
        raise ValueError(
            f"loop.mesh={layout} splits {num_heads} attention heads over {model} devices; "
            f"choose a divisor of {num_heads} for model."
        )
    axes = {"replica": layout.replicas, "data": layout.data, "model": model}
    if layout.replicas == 1:
        del axes["replica"]
    return _mesh(np.array(devices[:taken]).reshape(*axes.values()), tuple(axes))


def _mesh(grid: np.ndarray, axes: tuple[str, ...]) -> Mesh:
    # Explicit axes, the default, would demand shardings of every intermediate value.
    return Mesh(grid, axes, axis_types=(AxisType.Auto,) * len(axes))


def _first_device(devices: Sequence[jax.Device], layout: Layout) -> int:
    """First index of a layout in `devices`: the VAE should share a host with the last slice."""
    count = layout.stages * layout.stage_devices
    for start in range(len(devices) - layout.num_devices + 1 if layout.has_vae_slice else 0):
        if devices[start + count - 1].process_index == devices[start + count].process_index:
            return start
    return 0

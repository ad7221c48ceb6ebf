"""A plan as text for people, and as plain values for programs."""

import dataclasses
from typing import Any

from jax_avatar.planning.hardware import Hardware
from jax_avatar.planning.quantities import DeviceUse, Figure, Needs

__all__ = ["device_lines", "plan_as_dict", "plan_as_text"]

_ROWS = {
    "step_flop": ("arithmetic of a denoising step, formula", "TFLOP", 1e-12),
    "step_flop_counted": ("  the same, counted by XLA", "TFLOP", 1e-12),
    "decode_flop": ("arithmetic of decoding a block, formula", "TFLOP", 1e-12),
    "decode_flop_counted": ("  the same, counted by XLA (fewer: taps are summed)", "TFLOP", 1e-12),
    "training_flop": ("arithmetic of training on a clip, formula", "TFLOP", 1e-12),
    "block_history": ("keys and values of a block, formula", "GB", 1e-9),
    "generator_kept": ("kept in the generator's update, formula", "GB", 1e-9),
    "critic_kept": ("kept in the critic's update, formula", "GB", 1e-9),
    "step_compute_s": ("denoising step, bound by arithmetic", "ms", 1e3),
    "step_bandwidth_s": ("denoising step, bound by memory traffic", "ms", 1e3),
    "decode_s": ("decoding a block, bound", "ms", 1e3),
    "block_period_s": ("from block to block, at least", "ms", 1e3),
    "fps": ("frames per second, at most", "", 1.0),
    "first_frame_s": ("first frames after a block's audio, at least", "ms", 1e3),
}


def plan_as_dict(needs: Needs, hardware: Hardware) -> dict[str, Any]:
    """Plain values for JSON; every number comes with its source."""
    content = dataclasses.asdict(needs)
    for plain, device in zip(content["devices"], needs.devices, strict=True):
        plain |= {"total": device.total, "fits": device.fits}
    return content | {"fits": needs.fits, "hardware": dataclasses.asdict(hardware)}


def plan_as_text(needs: Needs, hardware: Hardware) -> str:
    """A table for a terminal."""
    lines = []
    for device in needs.devices:
        lines += [*device_lines(device, needs, hardware), ""]
    for name, (label, unit, factor) in _ROWS.items():
        if name in needs.figures:
            figure = needs.figures[name]
            source = "compiled" if figure.source == "compiled" else "computed"
            lines.append(f"  {label:52s}{factor * figure.value:12.1f} {unit:6s}{source}")
    lines += ["", *_remarks(needs, hardware)]
    lines.append("fits" if needs.fits else "does not fit")
    if not any(device.limit for device in needs.devices):
        lines[-1] = "whether it fits is not known: nothing is published about this hardware"
    return "\n".join([*lines, *(f"  -> {text}" for text in needs.advice)])


def device_lines(device: DeviceUse, needs: Needs, hardware: Hardware) -> list[str]:
    """Rows of one kind of device: what its memory holds, and where each number is from."""
    count = f"{device.count} devices" if device.count > 1 else "1 device"
    lines = [f"{device.role}: {count}, each {hardware.name}"]
    for name, figure in device.bytes.items():
        lines.append(_bytes(name, figure, _source(figure, needs)))
    lines.append(_bytes("together", Figure(device.total, ""), ""))
    if device.limit:
        verdict = "fits" if device.fits else "TOO SMALL"
        limit = Figure(device.limit, "")
        lines.append(_bytes(f"of {hardware.name}'s memory", limit, f"published; {verdict}"))
    if device.refused:
        lines.append(f"  the compiler refuses: {device.refused}")
    return lines


def _bytes(name: str, figure: Figure, source: str) -> str:
    unit, size = ("GiB", 2**30) if figure.value >= 2**30 else ("MiB", 2**20)
    return f"  {name:52s}{figure.value / size:12.2f} {unit:6s}{source}".rstrip()


def _source(figure: Figure, needs: Needs) -> str:
    return f"compiled, {needs.compiled_for}" if figure.source == "compiled" else figure.source


def _remarks(needs: Needs, hardware: Hardware) -> list[str]:
    lines = []
    if hardware.tflops:
        peaks = ", ".join(f"{kind} {peak:g}" for kind, peak in hardware.tflops.items())
        lines.append(
            f"published peaks of {hardware.name}: {peaks} TFLOP/s; {hardware.memory_gb:g} GB at "
            f"{hardware.bandwidth_gb_s:g} GB/s ({hardware.source})"
        )
    if hardware.platform == "gpu" and needs.compiled_for == "cpu":
        lines.append(
            "temporaries come from a compiler for CPUs, less the attention scores that cuDNN does "
            "not hold: an indication, not a promise"
        )
    elif hardware.platform == "tpu" and needs.compiled_for == "cpu":
        lines.append(
            "temporaries come from a compiler for CPUs, attention scores included, since the TPU "
            'compiler is not installed: pip install -e ".[plan]"'
        )
    return lines + list(needs.remarks)

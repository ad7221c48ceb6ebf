"""Floating-point operations of a training step, by formulas."""

from collections.abc import Mapping
from typing import Any

from jax.sharding import Mesh

from jax_avatar.models.config import DiTConfig
from jax_avatar.planning.hardware import recognise
from jax_avatar.planning.stream import step_flops
from jax_avatar.training.run.clock import Work

__all__ = ["clip_flops", "step_work"]


def step_work(
    stage: str, sections: Mapping[str, Any], batch_size: int, grid: tuple[int, int], mesh: Mesh
) -> Work:
    """Clips, tokens and operations of a step, and the peak of the devices, where they are known.

    Args:
        stage: its name.
        sections: of its settings, see `read_sections`.
        batch_size: clips of a batch.
        grid: latent rows and columns; of no consequence to encoders.
        mesh: of the run.
    """
    hardware = recognise(mesh.devices.flat[0].device_kind)
    peak = mesh.size * hardware.peak("bf16") if hardware else 0.0
    if stage in ("speech", "vae", "anchored_vae"):
        return Work(clips=batch_size, peak_flops=peak)
    config, task = sections["model"], sections["task"]
    count = _distillation if stage == "dmd" else _flow_matching
    return Work(
        clips=batch_size,
        tokens=batch_size * task.latents * (grid[0] // 2) * (grid[1] // 2),
        flops=batch_size * count(config, sections, grid),
        peak_flops=peak,
    )


def clip_flops(config: DiTConfig, grid: tuple[int, int], frames: int) -> tuple[float, float]:
    """Operations of one forward pass over a clip: products with weights, and attention.

    Attention counts all pairs of tokens, also those that a causal mask leaves out.

    Args:
        config: size of the transformer.
        grid: latent rows and columns.
        frames: latent frames.
    """
    d, patches = config.width, (grid[0] // 2) * (grid[1] // 2)
    n, noisy = (frames + 1) * patches, frames * patches
    linear = 2 * n * (6 * d * d + 2 * d * config.ffn_width) + 4 * config.text_len * d * d
    attention = 4 * n * n * d + 4 * n * config.text_len * d
    audio = len(config.audio_inject_layers) * 4 * noisy * d * d
    return float(config.num_layers * linear + audio), float(config.num_layers * attention)


def _trained(weights: float, attention: float, rank: int) -> float:
    """Forward and backward; a frozen base has no gradient of its own, and its adapter is small."""
    return (2 if rank else 3) * weights + 3 * attention


def _flow_matching(config, sections, grid) -> float:
    task = sections["task"]
    return _trained(*clip_flops(config, grid, task.latents), task.adapter_rank)


def _distillation(config, sections, grid) -> float:
    """Operations per clip: critic's update, and the generator's share of it, at the mean exit."""
    task, rollout = sections["task"], sections["rollout"]
    blocks = task.latents // config.frames_per_block
    block = step_flops(config, *grid)
    generate = blocks * block * (rollout.num_steps + 1) / 2
    whole = clip_flops(config, grid, task.latents)
    critic = generate + _trained(*whole, task.adapter_rank)
    # The exit step again with its gradient, then critic and teacher, with and without conditions.
    scores = (2 if task.guidance_scale == 1 else 3) * sum(whole)
    generator = generate + blocks * (2 if task.adapter_rank else 3) * block + scores
    return critic + generator / task.generator_every

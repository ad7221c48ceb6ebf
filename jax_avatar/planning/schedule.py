"""Schedule of a training run in words: steps, learning rates, batches, noise levels."""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from jax_avatar.models.config import DiTConfig
from jax_avatar.training.run.step import LoopConfig, learning_rate

__all__ = ["schedule_lines"]


def schedule_lines(stage: str, sections: Mapping[str, Any], loop: LoopConfig) -> Iterator[str]:
    """Lines on steps, learning rates, batches and noise levels.

    Args:
        stage: its name.
        sections: of its settings, see `read_sections`.
        loop: steps and optimiser.
    """
    rate = learning_rate(loop)
    middle, last = (float(rate(step)) for step in (loop.num_steps // 2, loop.num_steps))
    yield (
        f"{stage}: {loop.num_steps:,} steps, {loop.warmup_steps:,} of them warm-up; learning rate "
        f"{loop.learning_rate:g}, {middle:g} half-way, {last:g} at the end; betas {loop.betas}"
    )
    yield f"mesh: {loop.mesh or 'all devices for data'}; batches in {loop.accumulate} parts"
    task, model, rollout = (sections.get(name) for name in ("task", "model", "rollout"))
    if not isinstance(model, DiTConfig):
        return
    block = model.frames_per_block
    yield (
        f"batch: {task.batch_size} clips of {task.latents} latents ({4 * task.latents} video "
        f"frames), blocks of {block}, {model.ring_blocks - 1} past blocks seen"
    )
    if rollout is None:
        draws = np.array([_level(task, share) for share in (0.95, 0.5, 0.05)])
        yield (
            f"noise levels ({task.form}): 5 % above {draws[0]:.3f}, half above {draws[1]:.3f}, 5 % "
            f"below {draws[2]:.3f}; without speech {task.audio_dropout:.0%}, without prompt "
            f"{task.text_dropout:.0%}; adapters of rank {task.adapter_rank}"
        )
        return
    yield (
        f"denoising steps: {', '.join(f'{1000 * s:g}' for s in rollout.sigmas[:-1])}; "
        f"{rollout.sampler}; history: {rollout.history}, so a block of a stream takes "
        f"{rollout.num_evaluations} evaluations"
    )
    yield (
        f"generator updates: {loop.num_steps // task.generator_every:,}, one in "
        f"{task.generator_every} steps; critic's learning rate {task.critic_learning_rate:g}; "
        f"{_guidance(task)}; adapters of rank {task.adapter_rank}"
    )


def _guidance(task) -> str:
    """Guidance of the teacher in words."""
    scale, prompt = task.guidance_scale, task.text_guidance_scale
    text = (
        f"guidance {scale:g} by speech, {prompt:g} by prompt" if prompt else f"guidance {scale:g}"
    )
    low, high = task.guidance_bounds
    return text if (low, high) == (0, 1) else f"{text}, at levels {low:g} to {high:g}"


def _level(task, share: float) -> float:
    low, shift = task.smallest_sigma, task.shift
    return low + (1 - low) * shift * share / (1 + (shift - 1) * share)

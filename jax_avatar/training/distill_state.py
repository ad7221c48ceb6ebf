"""Settings, state and conditions of distillation."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from jax_avatar.models.conditions import Conditions
from jax_avatar.shapes import PyTree
from jax_avatar.training.adapters import AdapterConfig
from jax_avatar.training.dmd import NORMALIZERS
from jax_avatar.training.run.step import SCHEDULES

__all__ = ["SCHEDULE_COUNTS", "ClipBatch", "DistillConfig", "DistillState"]

SCHEDULE_COUNTS = ("steps", "updates")
_COUNTS = ("batch_size", "generator_every", "latents", "monitor_every", "max_critic_steps")


@dataclass(frozen=True)
class DistillConfig(AdapterConfig):
    """Batches, scores and what is trained.

    Attributes, with those of `AdapterConfig`:
        batch_size: clips per update.
        latents: latent frames per clip, whole blocks.
        generator_every: steps per update of the generator; the critic learns in each.
        critic_learning_rate: the generator's is the loop's.
        critic_schedule: of the critic's learning rate, "cosine" or "constant"; "" is the loop's.
            Warm-up, length and final share are the loop's, for both networks.
        schedule_counts: "steps", both schedules count outer steps, or "updates", each counts those
            of its own optimiser; the generator's then ends with its last update.
        guidance_scale: of the teacher, in the standard form: 1 is no guidance.
        text_guidance_scale: of the prompt alone; `guidance_scale` is then of the speech alone, and
            the teacher is asked once more. 0 guides by both together, with `guidance_scale`.
        guidance_bounds: noise levels, both included, outside of which nothing is guided.
        timestep_shift: of the scores' noise levels, toward noise.
        sigma_bounds: they are clamped to these; the lower one is at least the network's own
            `smallest_sigma`.
        normalizer: "clip" or "block", see `generator_gradient`.
        gradient_limit: largest element of the gradient.
        clean_limit: updates on clips with larger values are skipped; well above the data's.
        replay_limit: largest difference between the clips of Algorithm 2's two passes, in latent
            units; a larger one stops the run. 0 takes 1e-2 for a `dtype` of bfloat16, and 1e-3
            for float32, where rounding alone gives about 1e-5.
        ema_start: step at which averaging starts; before, the average is the weights.
        monitor_every: steps between reviews of the monitors.
        max_critic_steps: most updates of the critic per step, reached by doubling while it lags
            behind the generator; 1, as in Algorithm 1, for always one.
    """

    batch_size: int = 1
    latents: int = 21
    generator_every: int = 5
    critic_learning_rate: float = 2e-6
    critic_schedule: str = ""
    schedule_counts: str = "steps"
    guidance_scale: float = 4.0
    text_guidance_scale: float = 0.0
    guidance_bounds: Sequence[float] = (0.0, 1.0)
    timestep_shift: float = 5.0
    sigma_bounds: Sequence[float] = (0.02, 0.98)
    normalizer: str = "clip"
    gradient_limit: float = 10.0
    clean_limit: float = 20.0
    replay_limit: float = 0.0
    ema_start: int = 200
    monitor_every: int = 50
    max_critic_steps: int = 1

    def __post_init__(self):
        super().__post_init__()
        for name in ("sigma_bounds", "guidance_bounds"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if self.normalizer not in NORMALIZERS:
            raise ValueError(
                f"task.normalizer {self.normalizer!r} must be one of {', '.join(NORMALIZERS)}."
            )
        if self.critic_schedule not in ("", *SCHEDULES):
            raise ValueError(
                f"task.critic_schedule {self.critic_schedule!r} must be one of "
                f"{', '.join(SCHEDULES)}, or '' for the loop's."
            )
        if self.schedule_counts not in SCHEDULE_COUNTS:
            raise ValueError(
                f"task.schedule_counts {self.schedule_counts!r} must be one of "
                f"{', '.join(SCHEDULE_COUNTS)}."
            )
        low, high = self.sigma_bounds
        if not 0 < low < high < 1:
            raise ValueError(
                f"task.sigma_bounds {self.sigma_bounds} must rise within 0..1, both ends excluded."
            )
        bottom, top = self.guidance_bounds
        if not (0 <= bottom < top <= 1 and bottom <= high and low <= top):
            raise ValueError(
                f"task.guidance_bounds {self.guidance_bounds} must rise within 0..1 and meet "
                f"task.sigma_bounds {self.sigma_bounds}; for no guidance set task.guidance_scale=1."
            )
        if not self.text_guidance_scale >= 0:
            raise ValueError(
                f"task.text_guidance_scale {self.text_guidance_scale} must not be negative; 0 "
                "guides by prompt and speech together, 1 does not guide by the prompt."
            )
        for name in _COUNTS:
            if getattr(self, name) < 1:
                raise ValueError(f"task.{name} {getattr(self, name)} must be at least 1.")
        if not self.replay_limit >= 0:
            raise ValueError(
                f"task.replay_limit {self.replay_limit} must not be negative; 0 takes the dtype's."
            )

    def is_generator_step(self, step: int) -> bool:
        """True if the generator is updated in a step, counted from 0."""
        return (step + 1) % self.generator_every == 0

    def replay_limit_for(self, dtype: jnp.dtype) -> float:
        """The limit of `replay_error` for a compute type."""
        return self.replay_limit or (1e-3 if dtype == jnp.float32 else 1e-2)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class DistillState:
    """Everything that changes from step to step.

    Attributes:
        step: outer steps, each with one batch for the critic.
        generator: weights or adapter, float32.
        critic: likewise.
        ema: average of the generator, used for evaluation and export.
        ema_started: whether averaging has begun.
        generator_optimiser: state of the optimiser.
        critic_optimiser: likewise.
        generator_updates: that were made.
        critic_updates: that were made.
        guard: updates that were not, since something was not finite or too large.
        watch: the monitors' sums; the name is that of stored checkpoints.
    """

    step: Any
    generator: PyTree
    critic: PyTree
    ema: PyTree
    ema_started: Any
    generator_optimiser: PyTree
    critic_optimiser: PyTree
    generator_updates: Any
    critic_updates: Any
    guard: Any
    watch: Any

    @property
    def params(self) -> PyTree:
        """Weights that `ema` averages."""
        return self.generator


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class ClipBatch:
    """Conditions of clips to generate, and their numbers.

    Attributes:
        conditions: with `null_text`; their pose is one latent frame, which holds for all.
        row: number of each clip in the whole batch, `b`; with it go the clip's random numbers.
    """

    conditions: Conditions
    row: Any

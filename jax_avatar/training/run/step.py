"""One step of training on a loss, and the settings of the loop and its optimiser.

    loss(params, batch, key) --> gradient --> AdamW, EMA --> new state, metrics

A step depends on the seed, the step number and the state alone.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from jax_avatar.layout import parse_training_layout
from jax_avatar.models.sharding import clip_axes, constrain_params, on_mesh
from jax_avatar.shapes import Array, IntScalar
from jax_avatar.training.run.accumulate import accumulate_gradients, clip_keys
from jax_avatar.training.run.guards import check_update, guard_metrics, rate_factor
from jax_avatar.training.run.loggers import check_project
from jax_avatar.training.run.norms import average_distance, step_norms
from jax_avatar.training.run.profile import parse_profile
from jax_avatar.training.run.state import update_state

__all__ = [
    "SCHEDULES",
    "Batch",
    "LoopConfig",
    "Step",
    "compiled_step",
    "learning_rate",
    "make_optimiser",
]

SCHEDULES = ("cosine", "constant")
"""What the learning rate does after its warm-up."""

Batch = Mapping[str, Any]
Step = Callable[[Any, Batch, Array], tuple[Any, dict[str, Array]]]


# Of settings that a run with more, or with less than nothing, would be lost by.
_MOST = {
    "learning_rate": 1.0,
    "final_learning_rate": 1.0,
    "weight_decay": 1.0,
    "ema_decay": 1.0,
    "evaluate_every": math.inf,
    "keep_every": math.inf,
    "max_minutes": math.inf,
}


@dataclass(frozen=True)
class LoopConfig:
    """Optimiser, length and bookkeeping of a run.

    Attributes:
        num_steps: optimiser steps, in stage 2 outer steps; schedules end there.
        learning_rate: after the warm-up.
        schedule: of the learning rate after the warm-up, "cosine" or "constant".
        final_learning_rate: share of `learning_rate` left at the end of the cosine.
        warmup_steps: linear warm-up.
        weight_decay: decoupled, of AdamW, on arrays with two or more axes.
        betas: of AdamW.
        max_grad_norm: global-norm clip.
        ema_decay: of the averaged weights.
        accumulate: parts that a batch is computed in, one after the other, to save memory.
        mesh: devices, DATAxMODEL as in "4x2", or REPLICAxDATAxMODEL as in "16x8x1"; "" takes all
            for data if the batch divides, else one.
        seed: of initialisation and of the loss's random numbers.
        log_every: steps between lines in `metrics.jsonl`.
        evaluate_every: steps between evaluations; 0 for none.
        evaluate_clips: held-out clips that are streamed in each.
        validation_clips: held-out windows that the error of the velocity is measured on in each; 0
            for none.
        checkpoint_every: steps between checkpoints; the last step is always kept.
        keep: latest checkpoints kept. The last good one stays, too: none of the 100 steps before it
            was skipped, and where there are evaluations, it passed one.
        keep_every: checkpoints of steps that this divides are never deleted; 0 for none.
        max_minutes: stop (and save) after so long, to resume later; 0 for no limit.
        workers: processes that make batches; 0 leaves it to a thread of this one, which is enough
            for small clips and batches.
        profile: steps to trace into `WORKDIR/profile`, FROM:TO as "10:13", those after step FROM up
            to step TO; "" for none.
        wandb: project of Weights & Biases that metrics go to, too; "" for none.
    """

    num_steps: int
    learning_rate: float = 1e-3
    schedule: str = "cosine"
    final_learning_rate: float = 0.05
    warmup_steps: int = 100
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.99)
    max_grad_norm: float = 1.0
    ema_decay: float = 0.999
    accumulate: int = 1
    mesh: str = ""
    seed: int = 0
    log_every: int = 20
    evaluate_every: int = 0
    evaluate_clips: int = 8
    validation_clips: int = 16
    checkpoint_every: int = 500
    keep: int = 3
    keep_every: int = 500
    max_minutes: float = 0.0
    workers: int = 0
    profile: str = ""
    wandb: str = ""

    # Free to change between the parts of a run.
    BOOKKEEPING = (
        *("accumulate", "mesh"),
        *("log_every", "evaluate_every", "evaluate_clips", "validation_clips"),
        *("checkpoint_every", "keep", "keep_every", "max_minutes", "workers"),
        *("profile", "wandb"),
    )

    def __post_init__(self):
        object.__setattr__(self, "betas", tuple(self.betas))
        if self.num_steps < 1 or not 0 <= self.warmup_steps < self.num_steps:
            raise ValueError(
                f"num_steps {self.num_steps} with warmup_steps {self.warmup_steps}: at least one "
                "step and a shorter warm-up are expected."
            )
        if self.schedule not in SCHEDULES:
            raise ValueError(
                f"loop.schedule {self.schedule!r} must be one of {', '.join(SCHEDULES)}."
            )
        if self.mesh:
            parse_training_layout(self.mesh)
        if self.accumulate < 1:
            raise ValueError(f"loop.accumulate {self.accumulate} must be at least 1.")
        for name in ("log_every", "evaluate_clips", "checkpoint_every", "keep"):
            if getattr(self, name) < 1:
                raise ValueError(f"loop.{name} {getattr(self, name)} must be at least 1.")
        for name, most in _MOST.items():
            if not 0 <= getattr(self, name) <= most:
                raise ValueError(f"loop.{name} {getattr(self, name)} must be from 0 to {most}.")
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"loop.betas {self.betas} must be two shares below 1.")
        if not self.max_grad_norm > 0:
            raise ValueError(f"loop.max_grad_norm {self.max_grad_norm} must be above 0.")
        if not 0 <= self.workers <= 64:
            raise ValueError(
                f"loop.workers={self.workers}: expected a number of processes from 0 to 64 that "
                "make batches on each host."
            )
        if (traced := parse_profile(self.profile)) and traced[1] > self.num_steps:
            raise ValueError(
                f"loop.profile={self.profile}: the run has {self.num_steps} steps; end the trace "
                "there or before."
            )
        if self.validation_clips < 0:
            raise ValueError(f"loop.validation_clips {self.validation_clips} must be 0 or more.")
        check_project(self.wandb)


def learning_rate(config: LoopConfig) -> optax.Schedule:
    """Linear warm-up, then constant or a cosine; a function of the step's number."""
    share = config.final_learning_rate if config.schedule == "cosine" else 1.0
    warm = max(1, config.warmup_steps)
    return optax.warmup_cosine_decay_schedule(
        0.0 if config.warmup_steps else config.learning_rate,
        config.learning_rate,
        warm,
        max(config.num_steps, warm + 1),  # also of a run of one step
        config.learning_rate * share,
    )


def make_optimiser(
    config: LoopConfig, step: IntScalar | None = None
) -> optax.GradientTransformation:
    """Clip by global norm, then AdamW.

    Args:
        config: of the run.
        step: number of the run's step, from 0, which decides the learning rate; updates that were
            skipped, and several updates in a step, do not move it. The optimiser's own count of
            updates if not given.
    """
    schedule = learning_rate(config)
    return optax.chain(
        optax.clip_by_global_norm(config.max_grad_norm),
        optax.adamw(
            schedule if step is None else lambda count: schedule(step),
            *config.betas,
            weight_decay=config.weight_decay,
            mask=lambda params: jax.tree.map(lambda p: p.ndim > 1, params),
        ),
    )


def compiled_step(task: Any, config: LoopConfig, mesh: Mesh | None = None) -> Callable:
    """The step of a `LossTask` as one program: `(state, batch, key, frozen) -> (state, metrics)`.

    The state is donated. The key is the run's; the step number is folded in here.
    """
    schedule = learning_rate(config)

    def step(state, batch, key, frozen):
        key = jax.random.fold_in(key, state.step)

        def measure(part):
            rows, part = part
            slope = jax.value_and_grad(_mean_loss(task, config, frozen), has_aux=True)
            (loss, metrics), grads = slope(state.params, part, key, rows)
            return constrain_params(grads), {**metrics, "loss": loss}, ()

        rows = jnp.arange(max(len(leaf) for leaf in jax.tree.leaves(batch) if leaf.ndim))
        grads, metrics, _ = accumulate_gradients(measure, (rows, batch), config.accumulate)
        loss = metrics["loss"]
        cause, norm = check_update(loss, grads)
        rate = jnp.asarray(schedule(state.step), jnp.float32) * rate_factor(state.guard)
        extra = {"loss": loss, "grad_norm": norm, "learning_rate": rate}
        optimiser = make_optimiser(config, state.step)
        state, update = update_state(state, grads, cause, optimiser, config.ema_decay)
        metrics = {**metrics, **extra, **guard_metrics(state.guard, state.step - 1)}
        metrics |= step_norms("", grads, update, state.params, cause)
        metrics["ema_distance"] = average_distance(state.ema, state.params)
        return constrain_params(state), metrics

    return jax.jit(on_mesh(step, mesh), donate_argnums=0)


def _mean_loss(task, config, frozen):
    """`(params, batch, key, rows) -> (loss, metrics)`, means over the clips of a part."""
    more = () if frozen is None else (frozen,)
    if not task.by_clip:

        def whole(params, batch, key, rows):
            # One part has the step's own key.
            own = key if config.accumulate == 1 else jax.random.fold_in(key, rows[0])
            return task.loss(params, batch, own, *more)

        return whole

    def mean(params, batch, key, rows):
        def one(clip, key):
            return task.loss(params, jax.tree.map(lambda leaf: leaf[None], clip), key, *more)

        each = jax.vmap(one, spmd_axis_name=clip_axes())(batch, clip_keys(key, rows))
        return jax.tree.map(jnp.mean, each)

    return mean

"""Guards of training: skipped updates, rollbacks, and the end of a run.

    generated clip, loss, gradient --check_update--> applied, or skipped and counted by its cause
    more than 20 skips in 100 steps -> the last good checkpoint, new random stream, half the rates
    the third time -> the run stops
    a replay that differs from its rollout -> the update is skipped, the run saves and stops

All counts are part of the saved state, so that a resumed run does what the uninterrupted one would.
"""

import dataclasses
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jax_avatar.shapes import Array, IntScalar, Latent, PyTree, Scalar

__all__ = [
    "CAUSES",
    "Guard",
    "RunError",
    "TooManySkips",
    "after_rollback",
    "check_skips",
    "check_update",
    "find_strayed_replay",
    "guard_metrics",
    "is_passed",
    "new_guard",
    "rate_factor",
    "record_skip",
]

CAUSES = ("clean", "loss", "gradient")
"""Why an update is skipped: a generated value, the loss, or the gradient's norm was not finite or
too large; the gradient is also to blame where Algorithm 2's replay differs from its rollout. One
explains those after it, so the first is counted."""

_LARGEST_NORM = 1e4
_MAX_SKIPS, _WINDOW, _MAX_ROLLBACKS = 20, 100, 2
_NEVER = -(2**30)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Guard:
    """Counters of skipped updates and rollbacks.

    Attributes:
        skipped: updates that were not made, one count for each of `CAUSES`.
        marks: steps of the latest 21 of them, rising.
        rollbacks: how often the run went back.
    """

    # Any, because JAX and Orbax rebuild the state with other leaves inside.
    skipped: Any
    marks: Any
    rollbacks: Any

    @property
    def total(self) -> Array:
        """Updates that were not made, for whatever cause."""
        return self.skipped.sum()


class RunError(ValueError):
    """A run cannot go on, although its settings and its input were accepted."""


class TooManySkips(Exception):
    """The run has to go back.

    Attributes:
        rollbacks: how often it went back before.
    """

    def __init__(self, message: str, rollbacks: int):
        super().__init__(message)
        self.rollbacks = rollbacks


def new_guard() -> Guard:
    """Before the first step."""
    skipped = jnp.zeros(len(CAUSES), jnp.int32)
    return Guard(skipped, jnp.full(_MAX_SKIPS + 1, _NEVER, jnp.int32), jnp.int32(0))


def check_update(
    loss: Scalar,
    grads: PyTree,
    made: Latent | None = None,
    clean_limit: float = 20.0,
    *,
    is_replayed: Array | bool = True,
) -> tuple[Array, Array]:
    """Checks an update: True if it may be applied, and the norm of its gradient.

    Args:
        loss: of the step.
        grads: before clipping.
        made: clips that the generator made, where it did.
        clean_limit: what every value of them must stay below.
        is_replayed: True if the clips of the gradient are those of the rollout.

    Returns:
        The cause to skip it, 1 for the first of `CAUSES`, 0 for none; and the norm.
    """
    norm = optax.global_norm(grads)
    # Comparisons with NaN are false.
    is_small = True if made is None else jnp.max(jnp.abs(made)) < clean_limit
    is_right = (norm < _LARGEST_NORM) & is_replayed
    is_fine = jnp.stack([jnp.asarray(is_small), jnp.isfinite(loss), is_right])
    return jnp.where(is_fine.all(), 0, 1 + jnp.argmin(is_fine)).astype(jnp.int32), norm


def record_skip(guard: Guard, step: IntScalar, cause: Array) -> Guard:
    """The guard after an update.

    Args:
        guard: before it.
        step: number of the step, from 0.
        cause: from `check_update`.
    """
    later = jnp.append(guard.marks[1:], jnp.int32(step))
    return dataclasses.replace(
        guard,
        skipped=guard.skipped + (cause == 1 + jnp.arange(len(CAUSES))).astype(jnp.int32),
        marks=jnp.where(cause > 0, later, guard.marks),
    )


def rate_factor(guard: Guard) -> Array:
    """Multiplier of the learning rates: halved, exactly, by every rollback."""
    return jnp.ldexp(jnp.float32(1), -guard.rollbacks)


def guard_metrics(guard: Guard, step: IntScalar) -> dict[str, Array]:
    """Metrics.

    Args:
        guard: after the step.
        step: its number, from 0.
    """
    recent = jnp.sum(step - guard.marks < _WINDOW)
    causes = {f"skipped_{name}": guard.skipped[i] for i, name in enumerate(CAUSES)}
    counts = {"skipped": guard.total, "recent_skips": recent, "rollbacks": guard.rollbacks}
    return counts | causes


def check_skips(rows: Iterable[Mapping[str, Any]], step: int) -> None:
    """Looks for too many skips in the metrics of some steps, on the host.

    Args:
        rows: of every step since the last look.
        step: the last one.

    Raises:
        TooManySkips: more than 20 in 100 steps.
        RunError: likewise, after the run went back twice.
    """
    for row in rows:
        if row["recent_skips"] <= _MAX_SKIPS:
            continue
        counts = ", ".join(f"{name} {int(row[f'skipped_{name}'])}" for name in CAUSES)
        message = (
            f"by step {step} more than {_MAX_SKIPS} updates in {_WINDOW} steps were not finite or "
            f"too large (so far {counts})"
        )
        rollbacks = int(row["rollbacks"])
        if rollbacks >= _MAX_ROLLBACKS:
            raise RunError(
                f"{message}, for the third time, at a quarter of the learning rates; look for bad "
                "clips, lower the learning rates, or give a larger batch."
            )
        raise TooManySkips(message, rollbacks)


def find_strayed_replay(rows: Iterable[Mapping[str, Any]], step: int, limit: float) -> str:
    """Error of a replay that differed from its rollout, in the metrics of some steps, or "".

    Args:
        rows: of every step since the last look.
        step: the last one.
        limit: what `replay_error` must not exceed.
    """
    errors = (row.get("replay_error", 0.0) for row in rows)
    worst = max((error for error in errors if error > limit), default=None)
    if worst is None:
        return ""
    return (
        f"by step {step} Algorithm 2's second pass differed from the first by {worst:.2g}, more "
        f"than {limit:g} (task.replay_limit): its gradient would be another clip's. The usual "
        "causes are kernels that are not deterministic and other kernels or another sharding in "
        "the second pass; set XLA_FLAGS=--xla_gpu_deterministic_ops=true or try another "
        "model.attention or loop.mesh. No such update was made, the state is saved, and the same "
        "command continues. To accept such differences, raise task.replay_limit and pass --force."
    )


def is_passed(scores: Mapping[str, float]) -> bool:
    """True if all scores of an evaluation are finite."""
    return all(math.isfinite(score) for score in scores.values())


def after_rollback(guard: Guard, rollbacks: int) -> Guard:
    """The guard of a good checkpoint after going back there.

    Args:
        guard: as it was saved.
        rollbacks: how often the run went back, this time included.
    """
    # Skips after that checkpoint no longer count.
    return dataclasses.replace(guard, rollbacks=jnp.int32(rollbacks))

"""State of a training run, and the comparison of two runs' settings."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import optax

from jax_avatar.shapes import Array, PyTree
from jax_avatar.training.run.guards import Guard, new_guard, rate_factor, record_skip
from jax_avatar.weights.fields import fill_fields

__all__ = [
    "TrainState",
    "build_section",
    "config_differences",
    "scaled_update",
    "start_state",
    "update_ema",
    "update_state",
]

Section = TypeVar("Section")


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    """Everything that changes from step to step.

    Attributes:
        step: batches seen.
        params: weights, float32.
        ema: their exponential moving average, used for evaluation and export.
        optimiser: state of the optimiser.
        guard: what was skipped; a skipped step changed nothing else.
    """

    # Any, because JAX and Orbax rebuild the state with other leaves inside.
    step: Any
    params: PyTree
    ema: PyTree
    optimiser: PyTree
    guard: Any


def start_state(params: PyTree, optimiser: optax.GradientTransformation) -> TrainState:
    """The state before the first step."""
    # Two copies: the state is donated, and one buffer cannot be given away twice.
    params = jax.tree.map(lambda p: jnp.array(p, jnp.float32), params)
    ema = jax.tree.map(jnp.array, params)
    return TrainState(jnp.int32(0), params, ema, optimiser.init(params), new_guard())


def update_state(
    state: TrainState,
    grads: PyTree,
    cause: Array,
    optimiser: optax.GradientTransformation,
    ema_decay: float,
) -> tuple[TrainState, PyTree]:
    """One optimiser and EMA update, or none of either where there is a cause to skip it.

    Args:
        state: before the step; its step counter advances in any case.
        grads: gradient of the parameters.
        cause: from `check_update`.
        optimiser: clip, schedule and AdamW.
        ema_decay: final decay; early steps use less, `(1 + step) / (10 + step)`.

    Returns:
        The state after the step, and what was to be added to the parameters.
    """
    updates, moved = optimiser.update(grads, state.optimiser, state.params)
    updates = scaled_update(updates, state.guard)
    params = optax.apply_updates(state.params, updates)
    taken = (state.step - state.guard.total).astype(jnp.float32)
    decay = jnp.minimum(ema_decay, (1 + taken) / (10 + taken))
    ema = update_ema(state.ema, params, decay)

    def keep(new, old):
        return jax.tree.map(lambda n, o: jnp.where(cause == 0, n, o), new, old)

    after = TrainState(
        state.step + 1,
        keep(params, state.params),
        keep(ema, state.ema),
        keep(moved, state.optimiser),
        record_skip(state.guard, state.step, cause),
    )
    return after, updates


def scaled_update(updates: PyTree, guard: Guard) -> PyTree:
    """An optimiser's update at the rate that rollbacks have left."""
    factor = rate_factor(guard)
    return jax.tree.map(lambda u: factor * u, updates)


def update_ema(ema: PyTree, params: PyTree, decay: float | Array) -> PyTree:
    """`decay * ema + (1 - decay) * params`."""
    return jax.tree.map(lambda e, p: decay * e + (1 - decay) * p, ema, params)


def config_differences(saved: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Fields in which two configs differ, as "section.key: saved -> now"."""
    flat_saved, flat_now = _flatten(saved), _flatten(now)
    missing = "(missing)"
    return [
        f"{key}: {flat_saved.get(key, missing)} -> {flat_now.get(key, missing)}"
        for key in sorted(flat_saved.keys() | flat_now.keys())
        if flat_saved.get(key, missing) != flat_now.get(key, missing)
    ]


def build_section(kind: type[Section], values: Mapping[str, Any], name: str) -> Section:
    """A section of a config file as its dataclass.

    Raises:
        ValueError: as `fill_fields`.
    """
    return fill_fields(kind, values, f"config.{name}")


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            flat |= _flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = list(value) if isinstance(value, tuple) else value
    return flat

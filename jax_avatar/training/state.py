"""What a training run remembers, and whether two runs are the same run."""

import difflib
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import optax

from jax_avatar.shapes import Array, PyTree
from jax_avatar.training.guards import Guard, new_guard, note, rate_factor

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
        cause: from `judge`.
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
        note(state.guard, state.step, cause),
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
        ValueError: for a key that the dataclass lacks, naming the nearest one it has, or for a
            value of another type.
    """
    known = {field.name: field.type for field in fields(kind)}
    checked = {}
    for key, value in values.items():
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(known)}"
            raise ValueError(f"config.{name}.{key} is not a setting of {kind.__name__}; {hint}")
        checked[key] = _of_type(known[key], value, f"config.{name}.{key}")
    lacking = [
        field.name
        for field in fields(kind)
        if field.name not in values
        and field.default is MISSING
        and field.default_factory is MISSING
    ]
    if lacking:
        raise ValueError(f"config.{name} lacks {', '.join(lacking)}; give a value.")
    return kind(**checked)


def _of_type(kind: Any, value: Any, name: str) -> Any:
    """A value as written on a command line in the type of its field, where that is a plain one."""
    if isinstance(value, list):
        return tuple(value)
    if kind not in (bool, int, float, str) or type(value) is kind:
        return value
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if kind is float and is_number:
        return float(value)
    if kind is int and is_number and float(value).is_integer():
        return int(value)
    if kind is str and type(value) is int:  # --config.loop.mesh=2
        return str(value)
    raise ValueError(f"{name}: {value!r} came, expected a value of type {kind.__name__}.")


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            flat |= _flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = list(value) if isinstance(value, tuple) else value
    return flat

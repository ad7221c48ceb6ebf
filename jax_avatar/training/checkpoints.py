"""Checkpoints of a run: what is kept, whether it fits, going on from it and going back to it."""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from jax.sharding import Mesh
from orbax.checkpoint import checkpoint_managers as managers

from jax_avatar.shapes import PyTree
from jax_avatar.training.guards import TooManySkips, rolled_back
from jax_avatar.training.journal import Journal, warn
from jax_avatar.training.mesh import abstract_on, place_state
from jax_avatar.training.state import TrainState, config_differences

__all__ = ["check_settings", "open_manager", "restore", "restore_or_start", "roll_back", "save"]

_ITEMS = ("state", "settings", "pending")


def open_manager(workdir: Path, *, keep: int, keep_every: int) -> ocp.CheckpointManager:
    """Checkpoints in `workdir`: keeps the latest, those of round steps, and the last good one."""

    def goodness(metrics):
        return metrics["good"]

    policies = [managers.LatestN(keep), managers.BestN(get_metric_fn=goodness, n=1)]
    if keep_every:
        policies.append(managers.EveryNSteps(keep_every))
    options = ocp.CheckpointManagerOptions(
        preservation_policy=managers.AnyPreservationPolicy(policies),
        best_fn=goodness,
        enable_async_checkpointing=True,
    )
    return ocp.CheckpointManager(workdir / "checkpoints", item_names=_ITEMS, options=options)


def save(
    manager: ocp.CheckpointManager,
    step: int,
    state: PyTree,
    settings: Mapping[str, Any],
    pending: list[Mapping[str, Any]],
    *,
    is_good: bool,
) -> None:
    """Begins to write a checkpoint, unless there is one of this step.

    Args:
        manager: of the run.
        step: that has been made.
        state: after it.
        settings: of the run.
        pending: metrics of steps that were not logged yet.
        is_good: whether a run in trouble may go back to it.
    """
    if manager.latest_step() == step:
        return
    rows = [{k: float(v) for k, v in row.items()} for row in jax.device_get(pending)]
    manager.save(
        step,
        args=ocp.args.Composite(
            state=ocp.args.StandardSave(state),
            settings=ocp.args.JsonSave(settings),
            pending=ocp.args.JsonSave({"rows": rows}),
        ),
        metrics={"good": step if is_good else -1},
    )


def restore_or_start(
    manager: ocp.CheckpointManager, start: Callable[[], PyTree], step: int | None, mesh: Mesh
) -> tuple[PyTree, list]:
    """The state at a checkpoint, or before the first step, and the metrics not yet logged."""
    if step is None:
        return place_state(start(), mesh), []
    # Onto the mesh of this run, whichever it was saved from.
    like = abstract_on(mesh, jax.eval_shape(start))
    found = manager.restore(
        step,
        args=ocp.args.Composite(
            state=ocp.args.StandardRestore(like), pending=ocp.args.JsonRestore()
        ),
    )
    # Copied, because restored buffers may be shared and the state is donated.
    return jax.tree.map(jnp.array, found["state"]), found["pending"]["rows"]


def roll_back(
    manager: ocp.CheckpointManager,
    start: Callable[[], PyTree],
    mesh: Mesh,
    journal: Journal,
    trouble: TooManySkips,
) -> tuple[PyTree, list]:
    """The last good checkpoint, or the start, with half the learning rates and other chance."""
    manager.wait_until_finished()
    good = max((manager.metrics(step)["good"] for step in manager.all_steps()), default=-1)
    for step in manager.all_steps():
        if step > good:
            manager.delete(step)
    state, pending = restore_or_start(manager, start, None if good < 0 else good, mesh)
    rollbacks = trouble.rollbacks + 1
    journal.turn_back(max(good, 0), rollbacks)
    warn(f"{trouble}; back to step {max(good, 0)} with half the learning rates")
    state = dataclasses.replace(state, guard=rolled_back(state.guard, rollbacks))
    # On the mesh throughout, or the step would be compiled, and might round, differently.
    return place_state(state, mesh), pending


def check_settings(
    manager: ocp.CheckpointManager, settings: Mapping[str, Any], *, force: bool
) -> None:
    """Raises ValueError if the latest checkpoint was made with other settings."""
    step = manager.latest_step()
    if step is None or force:
        return
    found = manager.restore(step, args=ocp.args.Composite(settings=ocp.args.JsonRestore()))
    differences = config_differences(found["settings"], settings)
    if differences:
        raise ValueError(
            f"{manager.directory} was trained to step {step} with other settings "
            f"({'; '.join(differences)}). Use another workdir, restore the settings, or pass force."
        )


def restore(workdir: str | Path, like: PyTree = None) -> tuple[PyTree, dict]:
    """The latest checkpoint of a run and its settings.

    Args:
        workdir: folder given to `train`.
        like: a state of the same structure; without it the fields of a `TrainState` come back as
            the plain dictionaries they were stored as, and another state as one dictionary.
    """
    with ocp.CheckpointManager(
        Path(workdir).resolve() / "checkpoints", item_names=_ITEMS
    ) as manager:
        step = manager.latest_step()
        if step is None:
            raise ValueError(f"{workdir} holds no checkpoint; train there first.")
        found = manager.restore(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardRestore(like), settings=ocp.args.JsonRestore()
            ),
        )
    state = found["state"]
    if isinstance(state, Mapping) and set(state) == set(TrainState.__dataclass_fields__):
        state = TrainState(**state)
    return state, found["settings"]

"""Checkpoints of a run: what is kept, whether it fits, going on from it and going back to it."""

import contextlib
import dataclasses
import errno
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from jax.sharding import Mesh
from orbax.checkpoint import checkpoint_managers as managers

from jax_avatar.shapes import PyTree
from jax_avatar.training.run.guards import TooManySkips, after_rollback
from jax_avatar.training.run.journal import Journal, warn
from jax_avatar.training.run.placement import abstract_on, place_state
from jax_avatar.training.run.state import TrainState, config_differences
from jax_avatar.weights.files import load_json, save_json

__all__ = [
    "GoodSteps",
    "check_settings",
    "explain_disk_errors",
    "open_manager",
    "restore",
    "restore_or_start",
    "roll_back",
    "save",
]

_ITEMS = ("state", "settings", "pending")
_FULL = {errno.ENOSPC: "no space left", errno.EDQUOT: "the quota is used up"}
_FULL |= {errno.EROFS: "it is read-only"}
_FULL_TEXTS = {"No space left": _FULL[errno.ENOSPC], "quota exceeded": _FULL[errno.EDQUOT]}


@contextlib.contextmanager
def explain_disk_errors(workdir: Path) -> Iterator[None]:
    """Explains a folder that cannot be written to in one line.

    Raises:
        ValueError: what is done within wrote to a full or read-only disk; names the last whole
            checkpoint, since one that is not whole is no checkpoint.
    """
    try:
        yield
    except Exception as error:
        reason = _FULL.get(getattr(error, "errno", None))
        # TensorStore raises errors of its own, with the system's words.
        reason = reason or next((r for text, r in _FULL_TEXTS.items() if text in str(error)), None)
        if reason is None:
            raise
        folders = (workdir / "checkpoints").glob("*")
        step = max((int(path.name) for path in folders if path.name.isdigit()), default=None)
        left = "there is no checkpoint yet" if step is None else f"step {step} is the last saved"
        raise ValueError(
            f"{workdir} cannot be written to ({reason}); {left}. Make room there and repeat the "
            "command, which goes on from it."
        ) from error


class GoodSteps:
    """Steps whose checkpoints a run in trouble may go back to, kept in `good_steps.json`.

    A checkpoint is written before the evaluation that it has to pass, so its own metadata cannot
    say that it is good.
    """

    def __init__(self, workdir: Path):
        """Reads what an earlier part of the run has noted."""
        self._path = Path(workdir) / "good_steps.json"
        self._steps = set(load_json(self._path)["steps"]) if self._path.exists() else set()

    def add(self, step: int) -> None:
        """Notes a step; every host does."""
        self._write(self._steps | {step})

    def last(self, steps: Iterable[int]) -> int | None:
        """The last good one of some steps, None if none of them is."""
        return max(self._steps.intersection(steps), default=None)

    def forget_after(self, step: int) -> None:
        """Leaves the steps up to this one."""
        self._write({good for good in self._steps if good <= step})

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        """Retention of checkpoints: keeps the last good one."""
        del context
        last = self.last(checkpoint.step for checkpoint in checkpoints)
        return [checkpoint.step == last for checkpoint in checkpoints]

    def _write(self, steps: set[int]) -> None:
        self._steps = steps
        if jax.process_index() == 0:
            save_json(self._path, {"steps": sorted(steps)})


def open_manager(
    workdir: Path, good: GoodSteps, *, keep: int, keep_every: int
) -> ocp.CheckpointManager:
    """Checkpoints in `workdir`: keeps the latest, those of round steps, and the last good one."""
    policies = [managers.LatestN(keep), good]
    if keep_every:
        policies.append(managers.EveryNSteps(keep_every))
    options = ocp.CheckpointManagerOptions(
        preservation_policy=managers.AnyPreservationPolicy(policies),
        enable_async_checkpointing=True,
    )
    return ocp.CheckpointManager(workdir / "checkpoints", item_names=_ITEMS, options=options)


def save(
    manager: ocp.CheckpointManager,
    step: int,
    state: PyTree,
    settings: Mapping[str, Any],
    pending: list[Mapping[str, Any]],
) -> None:
    """Begins to write a checkpoint, unless there is one of this step.

    Args:
        manager: of the run.
        step: that has been made.
        state: after it.
        settings: of the run.
        pending: metrics of steps that were not logged yet.
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
    good: GoodSteps,
    start: Callable[[], PyTree],
    mesh: Mesh,
    journal: Journal,
    trouble: TooManySkips,
) -> tuple[PyTree, list]:
    """The last good checkpoint, or the start, half the learning rates and a new random stream."""
    manager.wait_until_finished()
    last = good.last(manager.all_steps())
    for step in manager.all_steps():
        if last is None or step > last:
            manager.delete(step)
    good.forget_after(last or 0)
    state, pending = restore_or_start(manager, start, last, mesh)
    rollbacks = trouble.rollbacks + 1
    journal.turn_back(last or 0, rollbacks)
    warn(f"{trouble}; back to step {last or 0} with half the learning rates")
    state = dataclasses.replace(state, guard=after_rollback(state.guard, rollbacks))
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

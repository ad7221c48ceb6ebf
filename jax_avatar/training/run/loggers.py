"""Loggers of metrics: `metrics.jsonl`, TensorBoard's event files, Weights & Biases."""

import json
import os
import re
import secrets
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

__all__ = [
    "JsonLines",
    "Logger",
    "TensorBoard",
    "WeightsAndBiases",
    "check_installed",
    "check_project",
    "read_lines",
]

METRICS = "metrics.jsonl"
_RUN_ID = "wandb_run_id.txt"


class Logger(Protocol):
    """One place where metrics go."""

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Adds the metrics of a step."""

    def turn_back(self, step: int, rollbacks: int) -> None:
        """Notes that the run went back to `step`, for the `rollbacks`-th time."""

    def close(self) -> None:
        """Writes what is not written yet."""


class JsonLines:
    """Appends to `metrics.jsonl`, one line per step that is logged."""

    def __init__(self, workdir: Path, first_step: int):
        """Drops lines of steps after `first_step`, the checkpoint that the run goes on from."""
        self._path = workdir / METRICS
        self._drop_after(first_step)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Implements `Logger`."""
        with self._path.open("a") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")

    def turn_back(self, step: int, rollbacks: int) -> None:
        """Puts the lines aside as `metrics_abandoned_1.jsonl` and drops those after `step`."""
        if self._path.exists():
            aside = self._path.with_name(f"{self._path.stem}_abandoned_{rollbacks}.jsonl")
            shutil.copy(self._path, aside)
        self._drop_after(step)

    def close(self) -> None:
        """Nothing: every line is written at once."""

    def _drop_after(self, step: int) -> None:
        if not self._path.exists():
            return
        kept = [line for line in read_lines(self._path) if line["step"] <= step]
        # In one piece, since this run may be killed, too.
        whole = self._path.with_suffix(".tmp")
        whole.write_text("".join(json.dumps(line) + "\n" for line in kept))
        os.replace(whole, self._path)


class TensorBoard:
    """Event files in `events`."""

    def __init__(self, workdir: Path, first_step: int):
        """Raises ImportError where tensorboardX is not installed."""
        from tensorboardX import SummaryWriter

        # What was written after that step, before a kill, is not shown.
        self._events = SummaryWriter(str(workdir / "events"), purge_step=first_step + 1)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Implements `Logger`."""
        for name, value in values.items():
            self._events.add_scalar(name, value, step)

    def turn_back(self, step: int, rollbacks: int) -> None:
        """Nothing: TensorBoard shows both branches."""

    def close(self) -> None:
        """Implements `Logger`."""
        self._events.close()


class WeightsAndBiases:
    """A run of Weights & Biases, which a resumed training run goes on with.

    The step is a metric of its own that all others are drawn against: W&B's own step can only
    rise, and a run that resumes or goes back writes some steps again.
    """

    def __init__(self, workdir: Path, project: str, settings: Mapping[str, Any]):
        """Starts or resumes the run whose id is in `workdir`.

        Args:
            workdir: folder of the training run; its name becomes the run's.
            project: of W&B; its entity, key and mode are read from W&B's own variables.
            settings: of the run, shown as its config.

        Raises:
            ValueError: W&B refused, for example without a login.
        """
        import wandb

        note = workdir / _RUN_ID
        run_id = note.read_text().strip() if note.exists() else secrets.token_hex(4)
        try:
            self._run = wandb.init(
                project=project,
                id=run_id,
                name=workdir.name,
                dir=str(workdir),
                config=dict(settings),
                resume="allow",
            )
        except wandb.errors.Error as error:
            raise ValueError(
                f"loop.wandb={project}: W&B refused ({' '.join(str(error).split())}); run `wandb "
                "login`, set WANDB_MODE=offline, or leave loop.wandb empty."
            ) from error
        note.write_text(f"{run_id}\n")
        self._run.define_metric("*", step_metric="step")

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Implements `Logger`."""
        self._run.log({"step": step, **values})

    def turn_back(self, step: int, rollbacks: int) -> None:
        """Nothing: the steps that are made again are drawn beside the abandoned ones."""

    def close(self) -> None:
        """Implements `Logger`."""
        self._run.finish()


def check_project(name: str) -> None:
    """Checks the name of a project of W&B; "" is none.

    Raises:
        ValueError: W&B would not take it.
    """
    if re.search(r"[/\\#?%:]", name) or len(name) > 128:
        raise ValueError(
            f"loop.wandb={name!r}: expected the name of a W&B project, up to 128 characters "
            "without / \\ # ? % :; the entity goes into the variable WANDB_ENTITY."
        )


def check_installed(project: str) -> None:
    """Checks that wandb is installed if a project is given.

    Raises:
        ValueError: it is not.
    """
    if not project:
        return
    try:
        # A folder `wandb` of offline runs would pass for a package of this name.
        from wandb import init  # noqa: F401
    except ImportError as error:
        raise ValueError(
            f"loop.wandb={project}: wandb is not installed ({error}); install the extra `wandb`, "
            'pip install "jax_avatar[wandb]", or leave loop.wandb empty.'
        ) from error


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Lines of metrics, without a last one that a kill cut short."""
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]

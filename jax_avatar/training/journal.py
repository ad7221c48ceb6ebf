"""What a run tells while it goes: lines of metrics, event files, alarms.

metrics of steps --mean--> `metrics.jsonl`, TensorBoard, warnings
"""

import contextlib
import json
import logging
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from jax_avatar.training.monitors import PREFIX, find_alarms

__all__ = ["Journal", "NoJournal", "mean_of", "warn"]

_AS_THEY_STAND = ("recent_skips", "rollbacks", "generator_updates", "learning_rate")
_logger = logging.getLogger(__name__)


def warn(message: str) -> None:
    """One line that does not break the progress bar."""
    with tqdm.external_write_mode():
        _logger.warning(message)


def mean_of(pending: list[Mapping[str, Any]]) -> dict[str, float]:
    """One line of metrics for several steps: means of measurements, counts as they stand."""
    fetched = jax.device_get(pending)
    values = {}
    # Some steps may measure more than others.
    for name in dict.fromkeys(name for metrics in fetched for name in metrics):
        column = np.array([metrics[name] for metrics in fetched if name in metrics], np.float64)
        finite = column[np.isfinite(column)]
        if name.startswith(PREFIX) and not finite.size:
            continue  # nothing was reviewed
        # Counters and rates are reported as they stand, measurements as means.
        is_last = name in _AS_THEY_STAND or name.startswith("skipped")
        values[name] = float(column[-1] if is_last or not finite.size else finite.mean())
    return values


class Journal:
    """Appends to `metrics.jsonl` and, where tensorboardX is installed, to event files."""

    def __init__(self, workdir: Path, first_step: int):
        workdir.mkdir(parents=True, exist_ok=True)
        self._path = workdir / "metrics.jsonl"
        self._alarms: dict[str, str] = {}
        self._drop_after(first_step)
        try:
            from tensorboardX import SummaryWriter

            # What was written after that step, before a kill, is not shown.
            self._events = SummaryWriter(str(workdir / "events"), purge_step=first_step + 1)
        except ImportError:
            self._events = None

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self._events:
            self._events.close()

    @property
    def alarming(self) -> dict[str, str]:
        """The alarms that are on, for the progress bar."""
        names = ",".join(name for name, text in self._alarms.items() if text)
        return {"alarm": names} if names else {}

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Adds a line, and warns of what has become alarming."""
        found = find_alarms(values)
        for name, text in found.items():
            if text and not self._alarms.get(name):
                warn(f"step {step}: {text}")
        self._alarms |= found
        values = {**values, **{f"alarm/{name}": float(bool(text)) for name, text in found.items()}}
        with self._path.open("a") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")
        if self._events:
            for name, value in values.items():
                self._events.add_scalar(name, value, step)

    def turn_back(self, step: int, rollbacks: int) -> None:
        """Puts the lines aside as `metrics_abandoned_1.jsonl` and forgets those after `step`."""
        if self._path.exists():
            aside = self._path.with_name(f"{self._path.stem}_abandoned_{rollbacks}.jsonl")
            shutil.copy(self._path, aside)
        self._drop_after(step)

    def _drop_after(self, step: int) -> None:
        """Forgets lines written after the checkpoint that the run continues from."""
        if not self._path.exists():
            return
        kept = []
        for line in self._path.read_text().splitlines(keepends=True):
            # A kill may have cut the last line short.
            if not line.endswith("\n") or json.loads(line)["step"] > step:
                break
            kept.append(line)
        # In one piece, since this run may be killed, too.
        whole = self._path.with_suffix(".tmp")
        whole.write_text("".join(kept))
        os.replace(whole, self._path)


class NoJournal(contextlib.AbstractContextManager):
    """The journal of hosts other than the first."""

    alarming: Mapping[str, str] = {}

    def __init__(self, workdir: Path, first_step: int):
        del workdir, first_step

    def __exit__(self, *_):
        pass

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Nothing."""

    def turn_back(self, step: int, rollbacks: int) -> None:
        """Nothing."""

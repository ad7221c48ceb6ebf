"""Metrics of a run while it goes, and alarms.

metrics of steps --mean--> loggers (`metrics.jsonl`, TensorBoard, W&B), warnings
"""

import contextlib
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from jax_avatar.training.run.loggers import JsonLines, Logger, TensorBoard, WeightsAndBiases
from jax_avatar.training.run.monitors import PREFIX, find_alarms

__all__ = ["Journal", "NoJournal", "mean_of", "warn"]

_AS_THEY_STAND = (
    *("recent_skips", "rollbacks", "generator_updates"),
    *("learning_rate", "generator_rate", "critic_rate"),
)
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
    """Writes to every logger of the run, and warns of what has become alarming."""

    def __init__(
        self,
        workdir: Path,
        first_step: int,
        wandb: str = "",
        settings: Mapping[str, Any] | None = None,
    ):
        """Opens the loggers: `metrics.jsonl`, TensorBoard if installed, W&B if configured.

        Args:
            workdir: folder of the run.
            first_step: of the checkpoint that it goes on from, or 0.
            wandb: project of W&B, or "".
            settings: of the run, for W&B.
        """
        workdir.mkdir(parents=True, exist_ok=True)
        self._alarms: dict[str, str] = {}
        self._loggers: list[Logger] = [JsonLines(workdir, first_step)]
        try:
            self._loggers.append(TensorBoard(workdir, first_step))
        except ImportError:
            warn(
                "tensorboardX is not installed: no event files, metrics.jsonl only; install the "
                'extra `train` for them: pip install "jax_avatar[train]"'
            )
        if wandb:
            self._loggers.append(WeightsAndBiases(workdir, wandb, settings or {}))

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for logger in self._loggers:
            logger.close()

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
        for logger in self._loggers:
            logger.write(step, values)

    def turn_back(self, step: int, rollbacks: int) -> None:
        """Reports to the loggers that the run went back to `step`."""
        for logger in self._loggers:
            logger.turn_back(step, rollbacks)


class NoJournal(contextlib.AbstractContextManager):
    """The journal of hosts other than the first."""

    alarming: Mapping[str, str] = {}

    def __init__(self, *_: Any):
        pass

    def __exit__(self, *_):
        pass

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Nothing."""

    def turn_back(self, step: int, rollbacks: int) -> None:
        """Nothing."""

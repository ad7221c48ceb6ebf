"""A trace of some steps, for TensorBoard's profile page or Perfetto."""

import re
from pathlib import Path
from typing import Any

import jax

from jax_avatar.training.run.journal import warn

__all__ = ["Profiler", "parse_profile", "step_annotation"]

_FOLDER = "profile"


def parse_profile(text: str) -> tuple[int, int] | None:
    """Reads "FROM:TO", the steps FROM + 1 to TO; "" is None.

    Raises:
        ValueError: it is neither, or not in this order.
    """
    if not text:
        return None
    match = re.fullmatch(r"(\d+):(\d+)", text)
    if not match or not int(match[1]) < int(match[2]):
        raise ValueError(
            f"loop.profile={text!r}: expected FROM:TO, the number of steps made before the trace "
            "and at its end, for example 10:13."
        )
    return int(match[1]), int(match[2])


class Profiler:
    """Traces the steps of `loop.profile` into `WORKDIR/profile`."""

    def __init__(self, text: str, workdir: Path):
        """Reads the setting; a run without it is not touched."""
        self._range, self._folder, self._runs = parse_profile(text), workdir / _FOLDER, False

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self._runs:
            self._stop()

    def before(self, step: int) -> None:
        """Starts the trace if it is time.

        Args:
            step: made so far.
        """
        if self._range and self._range[0] <= step < self._range[1] and not self._runs:
            jax.profiler.start_trace(str(self._folder))
            self._runs = True

    def after(self, step: int, results: Any) -> None:
        """Ends the trace if it is time, when the devices have done what is in it.

        Args:
            step: made so far.
            results: of the last one.
        """
        if self._runs and step >= self._range[1]:
            jax.block_until_ready(results)
            warn(f"step {step}: trace of the steps after {self._range[0]} in {self._folder}")
            self._stop()

    def _stop(self) -> None:
        jax.profiler.stop_trace()
        # A run that goes back makes these steps again, and traces them no more.
        self._runs, self._range = False, None


def step_annotation(step: int) -> jax.profiler.StepTraceAnnotation:
    """Names what happens within as a step in the trace, if there is one."""
    return jax.profiler.StepTraceAnnotation("train", step_num=step)

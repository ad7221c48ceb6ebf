"""Evaluations of a run on held-out data: tried before the first step, made periodically."""

from collections.abc import Callable, Sequence
from typing import Any, Protocol, runtime_checkable

from jax_avatar.shapes import PyTree
from jax_avatar.training.run.placement import fetched, on_first_host

__all__ = ["AverageEvaluation", "Evaluation", "try_out"]


@runtime_checkable
class Evaluation(Protocol):
    """Scores of the weights of the moment. All hosts call it together and get the same values."""

    def check(self, state: PyTree) -> None:
        """Tries it on the state before the first step; what it raises stops the run."""

    def __call__(self, state: PyTree, step: int) -> dict[str, float]:
        """Scores by name.

        Args:
            state: has `params` and their average `ema`, on the mesh of the run.
            step: of training.
        """


class AverageEvaluation:
    """An evaluation that the first host makes of the averaged weights, as arrays in its memory."""

    def __init__(self, score: Callable[[PyTree, int], dict[str, float]]):
        """Binds `(weights, step) -> scores`."""
        self._score = score

    def check(self, state: PyTree) -> None:
        """Makes it once."""
        self(state, int(state.step))

    def __call__(self, state: PyTree, step: int) -> dict[str, float]:
        """Implements `Evaluation`."""
        weights = fetched(state.ema)
        return on_first_host(lambda: self._score(weights, step))


def try_out(evaluations: Sequence[Evaluation], state: Any) -> None:
    """Checks all evaluations before the first step.

    Raises:
        ValueError: one cannot be made, with the reason in one line.
    """
    for evaluation in evaluations:
        try:
            evaluation.check(state)
        except Exception as error:  # whatever it is, it would end the run hours later
            cause = str(error).strip() or "no message"
            if not isinstance(error, ValueError):
                cause = f"{type(error).__name__}: {cause.splitlines()[0]}"
            raise ValueError(
                f"the evaluation failed, which is tried before the first step: {cause} Mend it, or "
                "pass --config.loop.evaluate_every=0."
            ) from error

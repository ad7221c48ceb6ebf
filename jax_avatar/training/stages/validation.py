"""Error of a network's velocity on held-out clips, in bins of the noise level.

    fixed clips, fixed noise, one level in every bin --network--> mean square error of each bin

Clips, noise and levels are the same in every call and on every mesh, so that a change of the error
is a change of the weights. All devices share the clips, as in a step of training.
"""

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float, Int

from jax_avatar.models.sharding import on_mesh
from jax_avatar.shapes import Array, PyTree
from jax_avatar.training.run.placement import fetched, local_rows, place_batch

__all__ = ["LEVELS_SEED", "NUM_BINS", "FlowValidation", "levels_in_bins"]

NUM_BINS = 10
"""Bins of the noise level, equally wide from 0 to 1."""

LEVELS_SEED = 1000
"""Of the noise and its levels, whatever the seed of the run."""

Errors = Callable[[PyTree, PyTree, PyTree], Float[Array, "b n"]]
MakeBatch = Callable[[Int[np.ndarray, " b"]], PyTree]


def levels_in_bins(key: Array) -> Float[Array, " n"]:
    """One noise level in every bin, all at the same place in it."""
    return (jnp.arange(NUM_BINS) + jax.random.uniform(key)) / NUM_BINS


class FlowValidation:
    """The error, of the averaged weights and of those that are trained.

    An `Evaluation` of the training loop.
    """

    def __init__(
        self,
        errors: Errors,
        make_batch: MakeBatch,
        mesh: Mesh,
        *,
        count: int,
        at_once: int,
        beside: Callable[[PyTree], PyTree] = lambda state: None,
        name: str = "flow",
    ):
        """Binds everything but the weights.

        Args:
            errors: `(weights, beside, batch) -> errors of every clip in every bin`, to be compiled.
            make_batch: numbers of clips -> those clips, on the host.
            mesh: of the run.
            count: clips.
            at_once: clips that are asked for together, a multiple of the mesh's "data".
            beside: the state -> other weights that are needed.
            name: of the error.
        """
        self._errors = jax.jit(on_mesh(errors, mesh))
        self._make_batch, self._mesh, self._beside, self._name = make_batch, mesh, beside, name
        self._count, self._at_once = count, at_once

    def check(self, state: PyTree) -> None:
        """Asks for the first clips."""
        self._asked(state, state.ema, 0)

    def __call__(self, state: PyTree, step: int) -> dict[str, float]:
        """Mean error `flow` and that of every bin, `flow_bin0` next to no noise.

        Those of the weights that are trained have `raw/` before their names.

        Args:
            state: of training.
            step: not used.
        """
        del step
        raw = self._mean(state, state.params)
        return self._mean(state, state.ema) | {f"raw/{key}": value for key, value in raw.items()}

    def _mean(self, state: PyTree, weights: PyTree) -> Mapping[str, float]:
        starts = range(0, self._count, self._at_once)
        found = np.concatenate([self._asked(state, weights, start) for start in starts])
        bins = found[: self._count].astype(np.float64).mean(0)
        values = {f"{self._name}_bin{i}": float(value) for i, value in enumerate(bins)}
        return {self._name: float(bins.mean())} | values

    def _asked(self, state: PyTree, weights: PyTree, start: int) -> Float[np.ndarray, "b n"]:
        """Errors of the clips from one on; after the last come the first again."""
        rows = np.arange(start, start + self._at_once) % self._count
        rows = rows[local_rows(len(rows), self._mesh)]
        batch = place_batch(self._make_batch(rows), self._mesh)
        return np.asarray(fetched(self._errors(weights, self._beside(state), batch)))

"""Interface of a training stage, with the defaults of what a stage may leave out.

Task        state and step of its own       DistillTask
LossTask    parameters and a loss           ForcingTask, VAETask, SpeechTask, ..
OnClips     a transformer on encoded clips  ForcingTask, DistillTask
"""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jax.sharding import Mesh

from jax_avatar.data.latents import Clips
from jax_avatar.layout import make_training_mesh
from jax_avatar.models.config import DiTConfig
from jax_avatar.models.network import Network
from jax_avatar.shapes import Array, PyTree
from jax_avatar.training.run.evaluation import Evaluation
from jax_avatar.training.run.state import start_state
from jax_avatar.training.run.step import Batch, LoopConfig, Step, compiled_step, make_optimiser

__all__ = ["LossTask", "OnClips", "Task"]


@runtime_checkable
class Task(Protocol):
    """A stage of training: its state, its step and its batches. Stages derive from it.

    Attributes:
        name: of the stage, for the progress bar.
        batch_size: clips of a batch, on the leading axis of all its arrays; None for a stage whose
            batches stay on one device.
        num_heads: attention heads of the transformer, if there is one, for the mesh.
        content_hash: of the data, "" if unknown; a run does not resume on other data.
        replay_limit: what the metric `replay_error` must not exceed. The run stops there; the step
            must have left its update out.
        grid: latent rows and columns of the clips, if there are any.
        streamed: structure and size of the transformer that `bound` gives parameters of; None for
            a stage without one.
    """

    name: str
    batch_size: int | None = None
    num_heads: int | None = None
    content_hash: str = ""
    replay_limit: float = math.inf
    grid: tuple[int, int] = (0, 0)
    streamed: Network | None = None

    def start(self, config: LoopConfig, key: Array) -> PyTree:
        """The state before the first step; it has `step`, `params`, `ema` and `guard`."""

    def make_step(self, config: LoopConfig, mesh: Mesh | None = None) -> Step:
        """The compiled `(state, batch, key) -> (state, metrics)`; the state is donated.

        The key is the run's; the step number is folded in here. Among the metrics are `loss` and
        those of `guards.guard_metrics`.
        """

    def batches(self, step: int, rows: np.ndarray | None = None) -> Batch:
        """Batch of a step; deterministic in the step.

        Args:
            step: number of the step, from 0.
            rows: numbers of the clips that this host needs; asked for on several hosts only.
        """

    @property
    def source(self) -> Callable[..., Batch]:
        """`batches` for other processes, which must be able to unpickle it (`loop.workers`)."""
        return self.batches

    def evaluations(self, config: LoopConfig, mesh: Mesh) -> Sequence[Evaluation]:
        """Evaluations that the loop makes every `evaluate_every` steps."""
        return ()

    def export(self, weights: PyTree, folder: str | Path, metadata: Mapping[str, Any]) -> None:
        """Writes the averaged weights at the end of a run; a stage may have nothing to write."""

    def mesh(self, config: LoopConfig) -> Mesh:
        """The mesh of a run.

        Raises:
            ValueError: devices, batch and heads do not divide.
        """
        return make_training_mesh(
            config.mesh, self.batch_size, accumulate=config.accumulate, num_heads=self.num_heads
        )


class LossTask(Task):
    """A stage that is a loss of parameters, minimised by AdamW.

    Attributes:
        by_clip: the loss is asked for one clip at a time, with a key of that clip, and the mean is
            taken: then no layout of devices and no accumulation changes it.
    """

    by_clip: bool = False

    def init(self, key: Array) -> PyTree:
        """Parameters to start from, nested dictionaries of arrays."""

    def loss(
        self, params: PyTree, batch: Batch, key: Array, *frozen: PyTree
    ) -> tuple[Array, dict[str, Array]]:
        """Loss and metrics, all scalars; pure, compiled by the loop.

        Args:
            params: of the network.
            batch: from `batches`, or one of its clips.
            key: of all random numbers.
            frozen: weights that are not trained, if the stage has any.
        """

    def frozen(self, mesh: Mesh | None = None) -> PyTree | None:
        """Weights that are not trained, if there are any."""
        return None

    def start(self, config: LoopConfig, key: Array) -> PyTree:
        """Implements `Task`."""
        return start_state(self.init(key), make_optimiser(config))

    def make_step(self, config: LoopConfig, mesh: Mesh | None = None) -> Step:
        """Implements `Task`."""
        step, frozen = compiled_step(self, config, mesh), self.frozen(mesh)
        return lambda state, batch, key: step(state, batch, key, frozen)


class OnClips:
    """Properties that `Task` needs of a stage that trains a transformer on encoded clips.

    Attributes:
        model: size of the transformer.
        settings: of the stage, with `batch_size`.
        clips: to train on.
    """

    model: DiTConfig
    settings: Any
    clips: Clips

    @property
    def batch_size(self) -> int:
        """Clips per update."""
        return self.settings.batch_size

    @property
    def num_heads(self) -> int:
        """Attention heads of the transformer."""
        return self.model.num_heads

    @property
    def content_hash(self) -> str:
        """Hash of the clips."""
        return self.clips.content_hash

    @property
    def grid(self) -> tuple[int, int]:
        """Latent rows and columns of the clips."""
        return tuple(self.clips.grid)

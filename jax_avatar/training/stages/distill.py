"""Distillation as a task for the loop: where its weights and clips come from and go to.

model folder ----------+--> config.json, VAE, front ends ---------> exported model folder
teacher, student ------+--> base, generator, critic ---steps---> dit (or lora) ----^
encoded clips: portraits and speech, no video needed
"""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from jax_avatar.data.latents import Clips
from jax_avatar.data.windows import Windows, check_fit
from jax_avatar.models.conditions import Conditions, still_pose
from jax_avatar.models.config import DiTConfig
from jax_avatar.models.lora import init_adapter
from jax_avatar.models.network import Network
from jax_avatar.shapes import Array, PyTree
from jax_avatar.training.adapters import FrozenBase
from jax_avatar.training.base_weights import check_not_merged, merge_record
from jax_avatar.training.distill_state import ClipBatch, DistillConfig, DistillState
from jax_avatar.training.distillation import (
    Distillation,
    check_levels,
    compiled_updates,
    critic_errors,
    make_distillation,
    start,
)
from jax_avatar.training.rollout_plan import RolloutConfig
from jax_avatar.training.run.monitors import ClipFigures, measure_data
from jax_avatar.training.run.step import LoopConfig
from jax_avatar.training.stages.task import OnClips, Task
from jax_avatar.training.stages.validation import LEVELS_SEED, FlowValidation
from jax_avatar.weights.folder import export_model, load_settings
from jax_avatar.weights.kinds import KINDS
from jax_avatar.weights.networks import network_config, read_adapter, read_dit
from jax_avatar.weights.settings import read_config

__all__ = ["DistillTask", "DistillWeights"]

_ROLES = {"generator": 0, "critic": 1}
_COMPARED = 256  # clips of the data whose figures generated ones are compared with


@dataclass(frozen=True)
class DistillWeights:
    """Folders with weights.

    Attributes:
        model: a whole model; its VAE, front ends and stream settings go with the student.
        teacher: has the transformer to distil; "" starts from random weights, to see it run.
        student: has the transformer, or with adapters the adapter `lora`, that the student starts
            from; "" is the teacher's, or a fresh adapter.
    """

    model: str
    teacher: str = ""
    student: str = ""


@dataclass(frozen=True, eq=False)
class _Batches:
    """`DistillTask.batches` without the task, for other processes."""

    windows: Mapping[str, Windows]  # by role
    settings: DistillConfig
    pose: str
    pose_channels: int

    def __call__(self, step: int, rows: np.ndarray | None = None) -> dict[str, ClipBatch]:
        roles = ["critic", *(["generator"] if self.settings.is_generator_step(step) else [])]
        rows = np.arange(self.settings.batch_size) if rows is None else rows
        return {role: self.clips(self.windows[role], step, rows) for role in roles}

    def clips(self, windows: Windows, step: int, rows: np.ndarray) -> ClipBatch:
        """Conditions of the clips of some windows."""
        batch = windows.batch(step, rows)
        conditions = Conditions(
            text=batch["text"],
            null_text=batch["null_text"],
            reference=batch["reference"],
            audio=batch["features"],
            pose=still_pose(self.pose, batch["reference"], self.pose_channels),
        )
        return ClipBatch(conditions, rows.astype(np.int32))


class DistillTask(OnClips, Task):
    """Self-forcing distillation with its own state and step."""

    name = "dmd"

    def __init__(
        self,
        model: DiTConfig,
        rollout: RolloutConfig,
        settings: DistillConfig,
        weights: DistillWeights,
        clips: Clips,
        *,
        seed: int = 0,
        fps: int | None = None,
        held_out: Callable[[], Clips | None] | None = None,
    ):
        """Checks that the parts fit together.

        Args:
            model: size of the transformer of all three networks.
            rollout: how the generator makes clips.
            settings: batches, scores and what is trained.
            weights: folders.
            clips: portraits and speech to train on.
            seed: of the choice of clips.
            fps: video frames per second; as the model in `weights.model` streams if not given.
            held_out: reads clips to validate on, if there are any.
        """
        check_not_merged(weights)
        kind = KINDS["dit"][read_config(weights.model)["dit"]]
        streamed = load_settings(weights.model)
        size, fps = streamed.size, fps or streamed.fps
        check_fit(
            clips,
            model,
            settings.latents,
            fps=fps,
            grid=network_config(weights.model, "vae").latent_grid(*size) if size else None,
        )
        if model.weights:
            raise ValueError(
                f"model.weights {model.weights!r} has no gradient; distil with weights as stored "
                "('') and round the student afterwards."
            )
        self.model, self.rollout, self.settings = model, rollout, settings
        self.weights, self._kind = weights, kind
        self.clips, self.seed, self._held_out = clips, seed, held_out
        self._fps = fps
        windows = {role: self._windows_of(clips, number) for role, number in _ROLES.items()}
        self._batches = _Batches(windows, settings, streamed.pose, model.pose_channels)
        check_levels(kind.network, rollout, settings)
        self._expected = Network.abstract(kind.network, model).params
        self.base = FrozenBase(self._read_or_draw)

    @property
    def replay_limit(self) -> float:
        """Largest difference between the two passes of Algorithm 2."""
        return self.settings.replay_limit_for(self.model.dtype)

    @property
    def source(self) -> Callable[..., dict[str, ClipBatch]]:
        """`batches` without the task, for other processes."""
        return self._batches

    def start(self, config: LoopConfig, key: Array) -> DistillState:
        """The state before the first step; `base` is read or drawn here."""
        base = self.base.on(self.mesh(config))
        settings, student = self.settings, self.weights.student
        if settings.adapter_rank:
            keys = jax.random.split(key)
            generator, critic = (init_adapter(base, settings.adapter_rank, key) for key in keys)
            if student:
                fields, teacher = settings.adapter_fields, self.weights.teacher
                generator = read_adapter(student, generator, fields, base=teacher)
        else:
            generator = read_dit(student, self._expected) if student else base
            critic = base
        return start(self._setup(config), generator, critic)

    def make_step(self, config: LoopConfig, mesh: Mesh | None = None):
        """The compiled `(state, batch, key) -> (state, metrics)`; the state is donated."""
        updates, base = compiled_updates(self._setup(config), mesh), self.base.on(mesh)

        def step(state, batch, key):
            metrics = {}
            for role, update in updates.items():
                if role in batch:
                    state, more = update(state, batch[role], key, base)
                    metrics |= more
            return state, metrics

        return step

    def batches(self, step: int, rows: np.ndarray | None = None) -> dict[str, ClipBatch]:
        """Conditions of a step, different ones for generator and critic.

        Args:
            step: number of the step, from 0.
            rows: numbers of the clips to make; all of the batch if not given.
        """
        return self._batches(step, rows)

    def evaluations(self, config: LoopConfig, mesh: Mesh) -> list[FlowValidation]:
        """The critic's error on clips that the student makes of held-out portraits and speech."""
        held_out = self._held_out() if self._held_out and config.validation_clips else None
        if held_out is None:
            return []
        windows, base = self._windows_of(held_out, len(_ROLES)), self.base.on(mesh)
        setup = self._setup(config)

        def errors(student, others, batch):
            key = jax.random.key(LEVELS_SEED)
            return critic_errors(setup, student, *others, batch, key)

        return [
            FlowValidation(
                errors,
                lambda rows: self._batches.clips(windows, 0, rows),
                mesh,
                count=min(config.validation_clips, len(windows.windows)),
                at_once=self.batch_size // config.accumulate,
                beside=lambda state: (state.critic, base),
                name="critic_flow",
            )
        ]

    @property
    def streamed(self) -> Network:
        """Structure and size of the student, with adapters if there are any."""
        return Network.abstract(self._kind.network, self.settings.adapted(self.model))

    def bound(self, weights: PyTree, mesh: Mesh | None = None) -> PyTree:
        """Parameters of the student, adapters beside the base, from what is trained."""
        return self.settings.bind(self.base.on(mesh))(weights)

    @property
    def stream_settings(self) -> dict[str, Any]:
        """Streaming settings of the student, as it was trained."""
        return {**self.rollout.sampling(), "fps": self._fps}

    def export(self, weights: PyTree, folder: str | Path, metadata: Mapping[str, Any]) -> None:
        """Writes a model folder that can be streamed: `config.json` and all its networks."""
        params, adapter = self.settings.stored(self.base, weights)
        metadata = {**metadata, "fps": self._fps, **merge_record(self.weights.teacher)}
        model = self.weights.model
        stream = self.stream_settings
        export_model(folder, model, params, self.model, metadata, stream=stream, adapter=adapter)

    def _setup(self, config: LoopConfig) -> Distillation:
        network, rollout = self._kind.network, self.rollout
        return make_distillation(network, self.model, rollout, self.settings, config, self._data)

    @functools.cached_property
    def _data(self) -> ClipFigures:
        some = self.clips.take(slice(None, None, -(-len(self.clips) // _COMPARED)))
        latents = some.latent[:, : self.settings.latents].astype(np.float32)
        return measure_data(latents, self.model.frames_per_block)

    def _windows_of(self, clips: Clips, number: int) -> Windows:
        seed = [self.seed, 2, number]
        return Windows.for_model(clips, self.model, self.settings, seed=seed)

    def _read_or_draw(self, mesh: Mesh | None) -> PyTree:
        teacher = self.weights.teacher
        return read_dit(teacher, self._expected, mesh) if teacher else self._random_teacher()

    def _random_teacher(self) -> PyTree:
        network, model = self._kind.network, self.model
        params = Network.of(jax.jit(lambda: network(model, rngs=nnx.Rngs(self.seed)))()).params
        # Its output layer starts at zero, which would leave nothing to distil.
        kernel = params["head"]["kernel"]
        noise = jax.random.normal(jax.random.key(self.seed), kernel.shape, kernel.dtype)
        params["head"]["kernel"] = 0.1 * noise
        return params

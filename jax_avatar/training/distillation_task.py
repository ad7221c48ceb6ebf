"""Distillation as a task for the loop: where its weights and clips come from and go to.

model folder ----------+--> config.json, VAE, front ends ---------> exported model folder
teacher, student ------+--> base, generator, critic --Distiller--> dit (or lora) --^
encoded clips: portraits and speech, no video needed
"""

import dataclasses
import functools
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from jax_avatar.io.checkpoint import (
    StoredWeights,
    load_json,
    load_weights,
    open_weights,
    save_json,
    save_weights,
    tree_of,
)
from jax_avatar.models.config import DiTConfig
from jax_avatar.models.dit import DiT
from jax_avatar.models.lora import add_adapter, init_adapter
from jax_avatar.models.params import abstract, flatten, split
from jax_avatar.models.portrait_dit import PortraitDiT
from jax_avatar.models.sharding import param_shardings
from jax_avatar.shapes import Array, PyTree
from jax_avatar.training.distillation import DistillConfig, Distiller, DistillState, Told
from jax_avatar.training.latents import Clips
from jax_avatar.training.loop import LoopConfig, mesh_of, on_mesh
from jax_avatar.training.mesh import place_state
from jax_avatar.training.monitors import ClipFigures, measure_data
from jax_avatar.training.rollout import Generator, RolloutConfig
from jax_avatar.training.windows import Windows, check_fit

__all__ = ["DistillTask", "DistillWeights"]

_NETWORKS = {"portrait": PortraitDiT, "wan_s2v": DiT}
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


class DistillTask:
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
    ):
        """Checks that the parts fit together.

        Args:
            model: size of the transformer of all three networks.
            rollout: how the generator makes clips.
            settings: batches, scores and what is trained.
            weights: folders.
            clips: portraits and speech to train on.
            seed: of the choice of clips.
        """
        content = load_json(Path(weights.model) / "config.json")
        if content.get("dit") not in _NETWORKS:
            raise ValueError(
                f"{weights.model}/config.json: dit {content.get('dit')!r} must be one of "
                f"{', '.join(_NETWORKS)}; give the folder of a whole model."
            )
        stream = content["stream"]
        size = stream.get("size")
        check_fit(
            clips,
            model,
            settings.latents,
            fps=stream.get("fps"),
            grid=(size[0] // 8, size[1] // 8) if size else None,
        )
        if model.weights:
            raise ValueError(
                f"model.weights {model.weights!r} has no gradient; distil with weights as stored "
                "('') and round the student afterwards."
            )
        self.model, self.settings, self.weights = model, settings, weights
        self.clips, self.seed, self._content = clips, seed, content
        self.batch_size, self.content_hash = settings.batch_size, clips.content_hash
        self._windows = {
            role: Windows(
                clips,
                settings.latents,
                settings.batch_size,
                text_len=model.text_len,
                text_width=model.text_width,
                seed=[seed, 2, number],
            )
            for role, number in _ROLES.items()
        }
        network, adapted = _NETWORKS[content["dit"]], settings.adapted(model)
        self._build = functools.partial(network, model)
        self.graphdef, self._expected = abstract(lambda: self._build(rngs=nnx.Rngs(0)))
        structure, _ = abstract(lambda: network(adapted, rngs=nnx.Rngs(0)))
        self.generator = Generator(structure, adapted, rollout)
        self._base = None

    def start(self, config: LoopConfig, key: Array) -> DistillState:
        """The state before the first step; `base` is read or drawn here."""
        base = self.base(mesh_of(self, config))
        rank, student = self.settings.adapter_rank, self.weights.student
        if rank:
            keys = jax.random.split(key)
            generator, critic = (init_adapter(base, rank, key) for key in keys)
            if student:
                generator = self._checked(load_weights(student, "lora")[0], generator, student)
        else:
            generator = self._read(student) if student else base
            critic = base
        return self._distiller(config).start(generator, critic)

    def make_step(self, config: LoopConfig, mesh: Mesh | None = None):
        """The compiled `(state, batch, key) -> (state, metrics)`; the state is donated.

        It is `Distiller.step`, compiled in two parts, one of which most steps leave out.
        """
        distiller, base = self._distiller(config), self.base(mesh)
        parts = {
            "generator": jax.jit(on_mesh(distiller.update_generator, mesh), donate_argnums=0),
            "critic": jax.jit(on_mesh(distiller.update_critic, mesh), donate_argnums=0),
        }

        def step(state, batch, key):
            metrics = {}
            for role, update in parts.items():
                if role in batch:
                    state, more = update(state, batch[role], key, base)
                    metrics |= more
            return state, metrics

        return step

    def batches(self, step: int, rows: np.ndarray | None = None) -> dict[str, Told]:
        """What clips are told in a step: other ones for the generator than for the critic.

        Args:
            step: number of the step, from 0.
            rows: numbers of the clips to make; all of the batch if not given.
        """
        roles = ["critic"]
        if (step + 1) % self.settings.generator_every == 0:
            roles.append("generator")
        rows = np.arange(self.batch_size) if rows is None else rows
        return {role: self._told(step, role, rows) for role in roles}

    def base(self, mesh: Mesh | None = None) -> PyTree:
        """The teacher's weights, spread over a mesh; read, or drawn from the seed, once."""
        if self._base is None:
            # Kept, so it must be numbers, also when first asked for while something is traced.
            with jax.ensure_compile_time_eval():
                self._base = jax.tree.map(jnp.asarray, self._read_or_draw(mesh))
                if mesh is not None:
                    self._base = place_state(self._base, mesh)
        return self._base

    def whole(self, weights: PyTree) -> PyTree:
        """Parameters of the transformer from what is trained, for evaluation."""
        if not self.settings.adapter_rank:
            return weights
        return add_adapter(self.base(), weights, self.settings.adapter_scaling)

    def export(self, weights: PyTree, folder: str | Path, metadata: Mapping[str, Any]) -> None:
        """Writes a model folder that can be streamed: `config.json` and all its networks."""
        folder, source = Path(folder), Path(self.weights.model)
        folder.mkdir(parents=True, exist_ok=True)
        for path in source.iterdir():
            # The rest of the model goes along as it is.
            if path.name.split(".")[0] not in ("config", "dit", "lora"):
                copy = shutil.copytree if path.is_dir() else shutil.copy
                if not (folder / path.name).exists():
                    copy(path, folder / path.name)
        config = dataclasses.asdict(self.model)
        config |= {"dtype": str(config["dtype"]), "param_dtype": str(config["param_dtype"])}
        content = dict(self._content)
        content.pop("lora", None)
        if self.settings.adapter_rank:
            fields = {"scaling": self.settings.adapter_scaling, "rank": self.settings.adapter_rank}
            save_weights(folder, "lora", jax.device_get(weights), fields, dict(metadata))
            content["lora"] = "lora"
            # The base as it lies on the devices of all hosts is not one host's to fetch.
            weights = self.base() if jax.process_count() == 1 else self._read_or_draw()
        save_weights(folder, "dit", jax.device_get(weights), config, dict(metadata))
        rollout = self.generator.settings
        content["stream"] = content["stream"] | {
            "sigmas": list(rollout.sigmas),
            "sink_distance": list(rollout.sink_distance),
        }
        save_json(folder / "config.json", content)

    def _distiller(self, config: LoopConfig) -> Distiller:
        return Distiller(self.generator, self.graphdef, self.settings, config, self._data)

    @functools.cached_property
    def _data(self) -> ClipFigures:
        some = self.clips.take(slice(None, None, -(-len(self.clips) // _COMPARED)))
        latents = some.latent[:, : self.settings.latents].astype(np.float32)
        return measure_data(latents, self.model.frames_per_block)

    def _told(self, step: int, role: str, rows: np.ndarray) -> Told:
        batch = self._windows[role].batch(step, rows)
        pose = reference = batch["reference"]
        if self._content["stream"].get("pose", "zeros") == "zeros":
            pose = np.zeros((*reference.shape[:-1], self.model.pose_channels), np.float32)
        return Told(
            batch["text"],
            batch["null_text"],
            reference,
            batch["features"],
            pose,
            rows.astype(np.int32),
        )

    def _read_or_draw(self, mesh: Mesh | None = None) -> PyTree:
        teacher = self.weights.teacher
        return self._read(teacher, mesh) if teacher else self._random_teacher()

    def _random_teacher(self) -> PyTree:
        params = split(jax.jit(lambda: self._build(rngs=nnx.Rngs(self.seed)))())[1]
        # Its output layer starts at zero, which would leave nothing to distil.
        kernel = params["head"]["kernel"]
        noise = jax.random.normal(jax.random.key(self.seed), kernel.shape, kernel.dtype)
        params["head"]["kernel"] = 0.1 * noise
        return params

    def _read(self, folder: str, mesh: Mesh | None = None) -> PyTree:
        params, _, _ = open_weights(folder, "dit")
        expected = self._checked(tree_of(params), self._expected, folder)
        if not isinstance(params, StoredWeights):
            return params
        # No device, nor the host, sees more than its own part.
        return params.restore(None if mesh is None else param_shardings(expected, mesh))

    def _checked(self, params: PyTree, expected: PyTree, folder: str) -> PyTree:
        got = {path: tuple(leaf.shape) for path, leaf in flatten(params).items()}
        want = {path: tuple(leaf.shape) for path, leaf in flatten(expected).items()}
        wrong = [path for path in got | want if got.get(path) != want.get(path)]
        if wrong:
            raise ValueError(
                f"weights in {folder} do not fit the transformer: {wrong[0]} is "
                f"{got.get(wrong[0], 'missing')}, expected {want.get(wrong[0], 'nothing')}; "
                "teacher and student must have the size that config.model says."
            )
        return params

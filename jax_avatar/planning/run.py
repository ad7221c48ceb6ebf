"""Dry run of training: schedule and memory without data, weights or a step.

settings --> schedule: steps, learning rates, noise levels, batch
        +--> shapes of the state (computed) --compile the step--> temporaries
"""

import dataclasses
import functools
import math
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jax_avatar.io.image import fit_size
from jax_avatar.models.conditions import Conditions
from jax_avatar.models.config import DiTConfig
from jax_avatar.models.params import abstract
from jax_avatar.models.speech.mel import SpeechEncoder
from jax_avatar.models.vae.anchored import AnchoredVAE
from jax_avatar.models.vae.light import LightVAE
from jax_avatar.planning.programs import Compiled, Program, compile_program
from jax_avatar.planning.training import still_clips
from jax_avatar.shapes import PyTree
from jax_avatar.training.distill_state import ClipBatch
from jax_avatar.training.distillation import compiled_updates, make_distillation, start
from jax_avatar.training.run.state import start_state
from jax_avatar.training.run.step import LoopConfig, compiled_step, learning_rate, make_optimiser
from jax_avatar.training.stages.build import read_sections
from jax_avatar.training.stages.flow import ForcingTask
from jax_avatar.weights.kinds import KINDS
from jax_avatar.weights.settings import LIVE_AVATAR, read_config

__all__ = ["plan_run"]

_SMALL = 50_000_000  # weights of networks whose step is compiled without being asked
_STRIDE = 8
_ENCODERS = {"speech": SpeechEncoder, "vae": LightVAE, "anchored_vae": AnchoredVAE}


def plan_run(settings: Mapping[str, Any], *, compiled: bool | None = None) -> Iterator[str]:
    """Lines that tell the schedule and the memory of a run.

    Args:
        settings: of the run, plain values, from its config file.
        compiled: whether the step is compiled to count its temporaries; by default where that
            takes seconds.

    Raises:
        ValueError: as `read_sections`.
    """
    sections, loop = read_sections(settings)
    yield from _schedule(settings["stage"], sections, loop)
    plan = _Plan(settings, sections, loop)
    count = sum(leaf.size for leaf in jax.tree.leaves(plan.network))
    yield f"network: {count:,} weights; {jax.device_count()} x {jax.devices()[0].device_kind}"
    total = 0
    for name, tree in plan.held.items():
        size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
        total += size
        yield _row(name, size, "computed")
    compiled = count < _SMALL if compiled is None else compiled
    peak = 0
    for program in plan.programs() if compiled else ():
        made: Compiled = compile_program(program)
        peak = max(peak, made.temporaries)
        yield _row(f"{program.name}: temporaries", made.temporaries, made.refused or "compiled")
    if not compiled:
        yield "gradients, activations and temporaries are not compiled at this size (--compile)"
    yield _row("together", total + peak, "one device holding all of it")


def _schedule(stage: str, sections: Mapping[str, Any], loop: LoopConfig) -> Iterator[str]:
    rate = learning_rate(loop)
    middle, last = (float(rate(step)) for step in (loop.num_steps // 2, loop.num_steps))
    yield (
        f"{stage}: {loop.num_steps:,} steps, {loop.warmup_steps:,} of them warm-up; learning rate "
        f"{loop.learning_rate:g}, {middle:g} half-way, {last:g} at the end; betas {loop.betas}"
    )
    yield f"mesh: {loop.mesh or 'all devices for data'}; batches in {loop.accumulate} parts"
    task, model, rollout = (sections.get(name) for name in ("task", "model", "rollout"))
    if stage in _ENCODERS:
        return
    block = model.frames_per_block
    yield (
        f"batch: {task.batch_size} clips of {task.latents} latents ({4 * task.latents} video "
        f"frames), blocks of {block}, {model.ring_blocks - 1} past blocks seen"
    )
    if rollout is None:
        draws = np.array([_level(task, share) for share in (0.95, 0.5, 0.05)])
        yield (
            f"noise levels ({task.form}): 5 % above {draws[0]:.3f}, half above {draws[1]:.3f}, 5 % "
            f"below {draws[2]:.3f}; without speech {task.audio_dropout:.0%}, without prompt "
            f"{task.text_dropout:.0%}; adapters of rank {task.adapter_rank}"
        )
        return
    yield (
        f"denoising steps: {', '.join(f'{1000 * s:g}' for s in rollout.sigmas[:-1])}; "
        f"{rollout.sampler}; history: {rollout.history}, so a block of a stream takes "
        f"{rollout.num_evaluations} evaluations"
    )
    yield (
        f"generator updates: {loop.num_steps // task.generator_every:,}, one in "
        f"{task.generator_every} steps; critic's learning rate {task.critic_learning_rate:g}; "
        f"{_guidance(task)}; adapters of rank {task.adapter_rank}"
    )


def _guidance(task) -> str:
    """Guidance of the teacher in words."""
    scale, prompt = task.guidance_scale, task.text_guidance_scale
    text = (
        f"guidance {scale:g} by speech, {prompt:g} by prompt" if prompt else f"guidance {scale:g}"
    )
    low, high = task.guidance_bounds
    return text if (low, high) == (0, 1) else f"{text}, at levels {low:g} to {high:g}"


def _level(task, share: float) -> float:
    low, shift = task.smallest_sigma, task.shift
    return low + (1 - low) * shift * share / (1 + (shift - 1) * share)


def _row(name: str, size: int, source: str) -> str:
    return f"  {name.replace('_', ' '):44s}{size / 2**20:14,.1f} MiB   {source}"


class _Plan:
    """Shapes of everything a run holds, and the programs of its step."""

    def __init__(self, settings: Mapping[str, Any], sections: Mapping[str, Any], loop: LoopConfig):
        self.stage, self.loop, self.sections = settings["stage"], loop, sections
        self.held: dict[str, PyTree] = {}
        model = sections["model"]
        if self.stage in _ENCODERS:
            build = _ENCODERS[self.stage]
            self.network = abstract(lambda: build(model, rngs=nnx.Rngs(0)))[1]
            self._hold(jax.eval_shape(self._started, self.network))
            return
        folder = sections["weights"].model
        kind, self.pose, self.grid = _of_model(folder, model)
        self.kind = KINDS["dit"][kind].network
        self.graphdef, self.network = abstract(lambda: self.kind(model, rngs=nnx.Rngs(0)))
        task, rank = sections["task"], sections["task"].adapter_rank
        trained = task.trained(self.network)
        is_dmd = self.stage == "dmd"
        self.base = self.network if is_dmd or rank else None
        if self.base is not None:
            self.held["base (teacher)" if is_dmd else "frozen base"] = self.base
        if not is_dmd:
            self._hold(jax.eval_shape(self._started, trained))
            return
        self.setup = make_distillation(self.kind, model, sections["rollout"], task, loop)
        self._hold(jax.eval_shape(functools.partial(start, self.setup), trained, trained))

    def programs(self) -> Iterator[Program]:
        """The compiled parts of a step."""
        platform = jax.default_backend()
        key = jax.eval_shape(lambda: jax.random.key(0))
        if self.stage in _ENCODERS:
            return
        if self.stage != "dmd":
            task, model = self.sections["task"], self.sections["model"]
            clips = still_clips(model, task.latents + task.motion_latents, self.grid)
            made = ForcingTask(model, task, clips, network=self.kind, pose=self.pose)
            batch = jax.eval_shape(lambda: jax.tree.map(jnp.asarray, made.batches(0)))
            arguments = (self.state, batch, key, self.base)
            yield Program("step", compiled_step(made, self.loop), arguments, platform, {})
            return
        arguments = (self.state, self._batch(), key, self.base)
        for role, update in compiled_updates(self.setup).items():
            yield Program(f"{role}'s update", update, arguments, platform, {})

    def _batch(self) -> ClipBatch:
        task, model = self.sections["task"], self.sections["model"]

        def array(*shape):
            return jax.ShapeDtypeStruct((task.batch_size, *shape), jnp.float32)

        text = array(1, model.text_width)
        still = array(1, *self.grid, model.latent_channels)
        states = (1, 4 * task.latents, model.audio_layers, model.audio_width)
        pose = array(1, *self.grid, model.pose_channels)
        row = jax.ShapeDtypeStruct((task.batch_size,), jnp.int32)
        conditions = Conditions(
            text=text, null_text=text, reference=still, audio=array(*states), pose=pose
        )
        return ClipBatch(conditions, row)

    def _started(self, params):
        return start_state(params, make_optimiser(self.loop))

    def _hold(self, state: Any) -> None:
        self.state = state
        for field in dataclasses.fields(state):
            tree = getattr(state, field.name)
            if any(math.prod(leaf.shape) > 1 for leaf in jax.tree.leaves(tree)):
                self.held[field.name] = tree


def _of_model(folder: str, model: DiTConfig) -> tuple[str, str, tuple[int, int]]:
    """Kind of transformer, pose input and latent grid: the model folder's, or the official ones."""
    try:
        content = read_config(folder)
        stream = content["stream"]
    except ValueError:
        content, stream = {"dit": "wan_s2v"}, {}
    area = stream.get("max_area", LIVE_AVATAR.max_area)
    height, width = stream.get("size") or fit_size(400, 720, area, LIVE_AVATAR.multiple)
    return content["dit"], stream.get("pose", "zeros"), (height // _STRIDE, width // _STRIDE)

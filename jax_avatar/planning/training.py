"""Device requirements of training, on shapes alone: `plan.py --task` and `train.py --dry_run`.

    weights, optimiser, average, frozen base    computed, spread over the mesh
    gradient step; or in distillation
    generator's update (Algorithm 2), critic's  compiled

Distillation has a formula beside them, which counts what must be kept, whichever is more: while
clips are made, keys and values of the blocks and the rings of the steps before the exit; for the
gradient, inputs of the layers of a block or of the critic's clip, and one layer's insides.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding

from jax_avatar.data.latents import LatentClips
from jax_avatar.io.image import fit_size
from jax_avatar.layout import make_training_mesh, parse_training_layout
from jax_avatar.models.conditions import Conditions
from jax_avatar.models.config import DiTConfig, WanVAEConfig
from jax_avatar.models.dit import DiT
from jax_avatar.models.network import Network
from jax_avatar.models.sharding import clip_axes
from jax_avatar.models.speech.mel import SpeechEncoder
from jax_avatar.models.vae.anchored import AnchoredVAE
from jax_avatar.models.vae.light import LightVAE
from jax_avatar.planning.hardware import HARDWARE, Hardware, stand_ins
from jax_avatar.planning.programs import AbstractModel, Program, compile_program, placed_bytes
from jax_avatar.planning.quantities import DeviceUse, Figure, Needs
from jax_avatar.planning.report import device_lines
from jax_avatar.planning.schedule import schedule_lines
from jax_avatar.planning.work import clip_flops
from jax_avatar.shapes import PyTree
from jax_avatar.training.distill_state import ClipBatch, DistillConfig
from jax_avatar.training.distillation import compiled_updates, make_distillation, start
from jax_avatar.training.rollout_plan import RolloutConfig
from jax_avatar.training.run.placement import abstract_on, clip_devices
from jax_avatar.training.run.state import TrainState, start_state
from jax_avatar.training.run.step import LoopConfig, compiled_step, make_optimiser
from jax_avatar.training.stages.build import read_sections
from jax_avatar.training.stages.flow import ForcingConfig, ForcingTask
from jax_avatar.weights.kinds import KINDS
from jax_avatar.weights.networks import network_config
from jax_avatar.weights.settings import LIVE_AVATAR, read_config

__all__ = [
    "Training",
    "kept_bytes",
    "plan_run",
    "plan_training",
    "summed_over_replicas",
    "training_devices",
    "training_programs",
]

_SMALL = 50_000_000  # weights of networks whose step is compiled without being asked
_LAYER_INSIDES = 24  # one layer keeps so many times its input for its gradient
_ENCODERS = {"speech": SpeechEncoder, "vae": LightVAE, "anchored_vae": AnchoredVAE}


@dataclass(frozen=True)
class Training:
    """A stage that trains a transformer.

    Attributes:
        network: class of the transformer.
        model: its size, without adapters.
        grid: latent rows and columns.
        task: of flow matching or of distillation.
        loop: steps and optimiser.
        rollout: how the generator makes clips; None in flow matching.
        pose: pose input, "zeros" or "reference".
    """

    network: type[DiT]
    model: DiTConfig
    grid: tuple[int, int]
    task: ForcingConfig | DistillConfig
    loop: LoopConfig
    rollout: RolloutConfig | None = None
    pose: str = "reference"


def plan_training(
    model: AbstractModel,
    grid: tuple[int, int],
    text: str,
    hardware: Hardware,
    sections: Mapping[str, Any],
    *,
    say: Callable[[str], None] = lambda text: None,
) -> Needs:
    """Compiles the programs of a step, and adds up what they need.

    Args:
        model: from `abstract_model`.
        grid: latent rows and columns.
        text: the mesh, "8", "4x2" or "16x8x1"; each device of "data" and "replica" has one clip.
        hardware: to plan for.
        sections: `model`, `task` and, of distillation, `rollout` of a config such as
            `configs/dmd.py`.
        say: called with a line before each part, since compiling takes minutes.
    """
    config = model.dit.config.replace(**sections["model"], rematerialise=True)
    mesh, compiled_for = training_devices(text, hardware, config.num_heads)
    is_tpu = mesh.devices.flat[0].platform == "tpu"
    values = {**sections["task"], "batch_size": clip_devices(mesh)}
    if "rollout" in sections:
        task, rollout = DistillConfig(**values), RolloutConfig(**sections["rollout"])
        config = config.replace(attention="splash" if is_tpu else "chunked")
        loop = LoopConfig(num_steps=1000, betas=(0.0, 0.999))
    else:
        task, rollout, loop = ForcingConfig(**values), None, LoopConfig(num_steps=1000)
        # Kernels take no block-causal mask; of this one, a few queries' scores are held.
        config = config.replace(attention="chunked", framepack=task.motion_latents > 0)
    kind = model.dit.module_class
    training = Training(kind, config, grid, task, loop, rollout)
    programs = training_programs(training, mesh)
    needs = _needs(programs, hardware, compiled_for, mesh.size, say=say)
    return dataclasses.replace(
        needs,
        figures=_figures(training, mesh),
        advice=() if needs.fits else _advice(training, needs, mesh),
        remarks=_remarks(training, programs, mesh),
    )


def plan_run(settings: Mapping[str, Any], *, compiled: bool | None = None) -> Iterator[str]:
    """Lines that tell the schedule and the memory of a run, as if one device held all of it.

    Args:
        settings: of the run, plain values, from its config file.
        compiled: whether the step is compiled to count its temporaries; by default where that
            takes seconds.

    Raises:
        ValueError: as `read_sections`.
    """
    sections, loop = read_sections(settings)
    stage, config = settings["stage"], sections["model"]
    yield from schedule_lines(stage, sections, loop)
    device = jax.devices()[0]
    mesh = make_training_mesh("1", None, devices=[device])
    if stage in _ENCODERS:
        network = Network.abstract(_ENCODERS[stage], config).params
        state = _started(loop, network, mesh)
        held, compiled = _held_by("weights", state), False
        programs = [Program("step", jax.jit(lambda: ()), (), device.platform, held)]
    else:
        kind, pose, grid = _of_model(sections["weights"].model, config)
        build = KINDS["dit"][kind].network
        network = Network.abstract(build, config).params
        training = Training(
            build, config, grid, sections["task"], loop, sections.get("rollout"), pose
        )
        programs = training_programs(training, mesh)
    count = sum(leaf.size for leaf in jax.tree.leaves(network))
    yield f"network: {count:,} weights; {jax.device_count()} x {device.device_kind}"
    compiled = count < _SMALL if compiled is None else compiled
    # One device need not hold all of it, so its memory is no limit.
    hardware = dataclasses.replace(
        HARDWARE["cpu"], name=device.device_kind, platform=device.platform
    )
    needs = _needs(programs, hardware, device.platform, 1, compiled=compiled)
    for use in needs.devices:
        yield from device_lines(use, needs, hardware)
    if not compiled:
        yield "gradients, activations and temporaries are not compiled here (--compile)"


def training_programs(training: Training, mesh: Mesh) -> list[Program]:
    """The gradient step of flow matching, or the generator's and the critic's update.

    Args:
        training: the stage.
        mesh: from `make_training_mesh`.
    """
    platform = mesh.devices.flat[0].platform
    key = _placed(jax.random.key(0), NamedSharding(mesh, PartitionSpec()))
    by_clip = NamedSharding(mesh, PartitionSpec(clip_axes(mesh.shape)))
    base = Network.abstract(training.network, training.model).params
    trained = training.task.trained(base)
    if training.rollout is None:
        clips = _still_clips(training)
        task = ForcingTask(
            *(training.model, training.task, clips), network=training.network, pose=training.pose
        )
        state, rank = _started(training.loop, trained, mesh), training.task.adapter_rank
        held = _held_by("adapter" if rank else "weights", state)
        base = abstract_on(mesh, base) if rank else None
        held = {"frozen base": base, **held} if rank else held
        arguments = (state, _placed(task.batches(0), by_clip), key, base)
        step = compiled_step(task, training.loop, mesh)
        return [Program("gradient step", step, arguments, platform, held)]
    setup = make_distillation(
        training.network, training.model, training.rollout, training.task, training.loop
    )
    state = abstract_on(mesh, jax.eval_shape(functools.partial(start, setup), trained, trained))
    base = abstract_on(mesh, base)
    held = {
        "frozen base": base,
        "generator and critic": (state.generator, state.critic),
        "averaged generator": state.ema,
        "optimisers": (state.generator_optimiser, state.critic_optimiser),
    }
    arguments = (state, _placed(_clip_batch(training), by_clip), key, base)
    return [
        Program(f"{role}'s update", update, arguments, platform, held)
        for role, update in compiled_updates(setup, mesh).items()
    ]


def kept_bytes(
    config: DiTConfig, grid: tuple[int, int], rollout: RolloutConfig, latents: int
) -> dict[str, float]:
    """Bytes per clip that the two updates keep, and those of one block's keys and values.

    Args:
        config: size of the transformer.
        grid: latent rows and columns.
        rollout: how the generator makes clips.
        latents: of a clip.

    Source: the sums of Algorithm 2 with recomputed layers.
    """
    per_latent = (grid[0] // 2) * (grid[1] // 2)
    size, blocks = config.dtype.itemsize, latents // config.frames_per_block
    window = min(config.ring_blocks - 1, blocks)
    n, whole = config.frames_per_block * per_latent, (latents + 1) * per_latent
    row = config.width * size
    history = 2.0 * config.num_layers * n * row
    rings = 0.0
    if not rollout.shares_history:
        rings = (rollout.num_steps - 1) * window * history

    def backward(tokens):
        return (config.num_layers + _LAYER_INSIDES) * tokens * row

    return {
        "block_history": history,
        "generator_kept": blocks * history + max(rings, backward(n)),
        "critic_kept": max(window * history + rings, backward(whole)),
    }


def training_devices(text: str, hardware: Hardware, num_heads: int) -> tuple[Mesh, str]:
    """Stand-ins for the devices of a training mesh, and what they are.

    Args:
        text: "8", "4x2" or "16x8x1", as `loop.mesh`.
        hardware: to plan for.
        num_heads: of the transformer.
    """
    layout = parse_training_layout(text)

    def make(devices):
        devices = list(devices)[: layout.num_devices]
        return make_training_mesh(text, layout.clip_devices, num_heads=num_heads, devices=devices)

    devices, compiled_for = stand_ins(hardware, make)
    return make(devices), compiled_for


def summed_over_replicas(mesh: Mesh, trained: PyTree) -> tuple[str, ...]:
    """A remark on what crosses between replicas in an update, if there are any.

    Args:
        mesh: of the run.
        trained: what gets a gradient.
    """
    if "replica" not in mesh.shape:
        return ()
    size = sum(4 * leaf.size for leaf in jax.tree.leaves(trained)) / 1e9
    return (
        f"weights are gathered within the {mesh.shape['data']} devices of a replica; gradients, "
        f"{size:.2g} GB in float32, are summed over {mesh.shape['replica']} replicas",
    )


def _needs(
    programs: Sequence[Program],
    hardware: Hardware,
    compiled_for: str,
    count: int,
    *,
    compiled: bool = True,
    say: Callable[[str], None] = lambda text: None,
) -> Needs:
    uses, seconds = [], {}
    for program in programs:
        used = {name: Figure(placed_bytes(tree), "computed") for name, tree in program.held.items()}
        refused = ""
        if compiled:
            stands_in = hardware.platform != program.platform
            made = compile_program(program, compiled_for, say=say, stands_in=stands_in)
            seconds[program.name], refused = made.seconds, made.refused
            if not refused:
                temporaries = Figure(float(made.temporaries), "compiled")
                used["gradients, activations, temporaries"] = temporaries
        uses.append(DeviceUse(program.name, count, used, 1e9 * hardware.memory_gb, refused))
    return Needs(compiled_for, tuple(uses), {}, 0, (), seconds)


def _figures(training: Training, mesh: Mesh) -> dict[str, Figure]:
    config, grid, latents = training.model, training.grid, training.task.latents
    if training.rollout is None:
        # All weights: forward, backward twice that, forward again.
        return {"training_flop": Figure(4 * sum(clip_flops(config, grid, latents)), "computed")}
    kept = kept_bytes(config, grid, training.rollout, latents)
    return {name: Figure(size / mesh.shape["model"], "computed") for name, size in kept.items()}


def _advice(training: Training, needs: Needs, mesh: Mesh) -> tuple[str, ...]:
    if training.rollout is not None:
        *data, parts = mesh.devices.shape
        larger = "x".join(map(str, (*data, 2 * parts)))
        return (f"--mesh {larger}, or history.cache exit_only (rollout.cache)",)
    (use,) = needs.devices
    state = sum(figure.value for figure in use.bytes.values() if figure.source == "computed")
    enough = math.ceil(2 * state * mesh.size / use.limit) if use.limit else 0
    return (
        f"--mesh {max(enough, 2 * mesh.size)}: the state alone fills "
        f"{state / max(use.limit, 1):.1f} of a device's memory on {mesh.size}",
    )


def _remarks(training: Training, programs: Sequence[Program], mesh: Mesh) -> tuple[str, ...]:
    rank, held = training.task.adapter_rank, programs[0].held
    batch = (
        f"the batch is {clip_devices(mesh)} clips of {training.task.latents} latents, one per data "
        "device; more are accumulated (loop.accumulate) in the same memory"
    )
    if training.rollout is None:
        what = f"adapters of rank {rank}" if rank else "all weights are trained"
        trained = held["adapter" if rank else "weights"]
    else:
        past = training.model.ring_blocks - 1
        what = f"history: {training.rollout.history}, {past} past blocks seen"
        trained = held["averaged generator"]  # one network is updated at a time
    return (batch, what, *summed_over_replicas(mesh, trained))


def _started(loop: LoopConfig, trained: PyTree, mesh: Mesh) -> TrainState:
    state = jax.eval_shape(lambda params: start_state(params, make_optimiser(loop)), trained)
    return abstract_on(mesh, state)


def _held_by(what: str, state: TrainState) -> dict[str, PyTree]:
    return {what: state.params, f"averaged {what}": state.ema, "optimiser": state.optimiser}


def _placed(tree: PyTree, sharding: Sharding) -> PyTree:
    """Shapes of a tree, all in the same place."""
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), tree
    )


def _clip_batch(training: Training) -> ClipBatch:
    config, grid, task = training.model, training.grid, training.task

    def array(*shape, dtype=jnp.float32):
        return jax.ShapeDtypeStruct((task.batch_size, *shape), dtype)

    text = array(config.text_len, config.text_width)
    conditions = Conditions(
        text=text,
        null_text=text,
        reference=array(1, *grid, config.latent_channels),
        audio=array(1, 4 * task.latents, config.audio_layers, config.audio_width),
        pose=array(1, *grid, config.pose_channels),
    )
    return ClipBatch(conditions, array(dtype=jnp.int32))


def _still_clips(training: Training) -> LatentClips:
    """One silent grey clip, for its shapes."""
    config, grid, task = training.model, training.grid, training.task
    frames, c = task.latents + task.motion_latents, config.latent_channels
    return LatentClips(
        latent=np.zeros((1, frames, *grid, c), np.float16),
        reference=np.zeros((1, 1, *grid, c), np.float16),
        features=np.zeros((1, 4 * frames, config.audio_layers, config.audio_width), np.float16),
        mouth=np.zeros((1, frames, *grid), np.float16),
        lip_gap=np.zeros((1, 4 * frames), np.float16),
        person=np.zeros(1, np.int32),
    )


def _of_model(folder: str, model: DiTConfig) -> tuple[str, str, tuple[int, int]]:
    """Kind of transformer, pose input and latent grid: the model folder's, or the official ones."""
    try:
        content, vae = read_config(folder), network_config(folder, "vae")
        stream = content["stream"]
    except ValueError:
        content, stream, vae = {"dit": "wan_s2v"}, {}, WanVAEConfig()
    area = stream.get("max_area", LIVE_AVATAR.max_area)
    size = stream.get("size") or fit_size(400, 720, area, LIVE_AVATAR.multiple)
    return content["dit"], stream.get("pose", "zeros"), vae.latent_grid(*size)

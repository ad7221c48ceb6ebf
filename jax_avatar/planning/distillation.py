"""Device requirements of self-forcing distillation: both updates, compiled on shapes.

    frozen base, two adapters, average, moments   computed, spread over the mesh
    generator's update (Algorithm 2), critic's    compiled, one clip per data device

The formula beside them counts what must be kept, whichever is more: while clips are made, keys and
values of the blocks and the rings of the steps before the exit; for the gradient, inputs of the
layers of a block or of the critic's clip, and one layer's insides.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jax_avatar.models.conditions import Conditions
from jax_avatar.models.config import DiTConfig
from jax_avatar.models.params import abstract
from jax_avatar.models.sharding import clip_axes
from jax_avatar.planning.hardware import Hardware
from jax_avatar.planning.programs import AbstractModel, Program, compile_program, placed_bytes
from jax_avatar.planning.quantities import DeviceUse, Figure, Needs
from jax_avatar.planning.training import placed, summed_over_replicas, training_devices
from jax_avatar.training.distill_state import ClipBatch, DistillConfig
from jax_avatar.training.distillation import compiled_updates, make_distillation, start
from jax_avatar.training.rollout_plan import RolloutConfig
from jax_avatar.training.run.placement import abstract_on, clip_devices
from jax_avatar.training.run.step import LoopConfig

__all__ = ["distillation_programs", "kept_bytes", "plan_distillation"]

_LAYER_INSIDES = 24  # one layer keeps so many times its input for its gradient


def distillation_programs(
    model: AbstractModel,
    grid: tuple[int, int],
    mesh: Mesh,
    rollout: RolloutConfig,
    settings: DistillConfig,
    *,
    attention: str,
) -> list[Program]:
    """The generator's and the critic's update.

    Args:
        model: from `abstract_model`, with the window of training.
        grid: latent rows and columns.
        mesh: from `make_training_mesh`.
        rollout: how the generator makes clips.
        settings: what is trained; the batch is one clip per device that has its own clips.
        attention: kernel, see `DiTConfig`.
    """
    config = model.dit.config.replace(attention=attention, rematerialise=True)
    settings = dataclasses.replace(settings, batch_size=clip_devices(mesh))
    build = model.dit.module_class
    base = abstract(lambda: build(config, rngs=nnx.Rngs(0)))[1]
    loop = LoopConfig(num_steps=1000, betas=(0.0, 0.999))
    setup = make_distillation(build, config, rollout, settings, loop)
    trained = settings.trained(base)
    state = abstract_on(mesh, jax.eval_shape(functools.partial(start, setup), trained, trained))
    base = abstract_on(mesh, base)
    key = placed(jax.random.key(0), NamedSharding(mesh, PartitionSpec()))
    arguments = (state, _batch(config, grid, settings, mesh), key, base)
    held = {
        "frozen base": base,
        "generator and critic": (state.generator, state.critic),
        "averaged generator": state.ema,
        "optimisers": (state.generator_optimiser, state.critic_optimiser),
    }
    platform = mesh.devices.flat[0].platform
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


def plan_distillation(
    model: AbstractModel,
    grid: tuple[int, int],
    text: str,
    hardware: Hardware,
    sections: Mapping[str, Any],
    *,
    say: Callable[[str], None] = lambda text: None,
) -> Needs:
    """Compiles both updates, and adds up what they need.

    Args:
        model: from `abstract_model`.
        grid: latent rows and columns.
        text: the mesh, "8", "4x2" or "16x8x1".
        hardware: to plan for.
        sections: `model`, `rollout` and `task` of a config such as `configs/dmd.py`.
        say: told what is being done, since compiling takes minutes.
    """
    model = model.resized(sections["model"])
    config = model.dit.config
    rollout = RolloutConfig(**sections["rollout"])
    settings = DistillConfig(**sections["task"])
    mesh, compiled_for = training_devices(text, hardware, config.num_heads)
    is_tpu = mesh.devices.flat[0].platform == "tpu"
    attention = "splash" if is_tpu else "chunked"
    programs = distillation_programs(model, grid, mesh, rollout, settings, attention=attention)
    limit, uses, seconds = 1e9 * hardware.memory_gb, [], {}
    for program in programs:
        stands_in = hardware.platform != program.platform
        made = compile_program(program, compiled_for, say=say, stands_in=stands_in)
        used = {name: Figure(placed_bytes(tree), "computed") for name, tree in program.held.items()}
        if not made.refused:
            used["gradients, activations, history"] = Figure(float(made.temporaries), "compiled")
        uses.append(DeviceUse(program.name, mesh.size, used, limit, made.refused))
        seconds[program.name] = made.seconds
    kept = kept_bytes(config, grid, rollout, settings.latents)
    figures = {k: Figure(v / mesh.shape["model"], "computed") for k, v in kept.items()}
    advice = ()
    if not all(use.fits for use in uses):
        *data, parts = mesh.devices.shape
        larger = "x".join(map(str, (*data, 2 * parts)))
        advice = (f"--mesh {larger}, or history.cache exit_only (rollout.cache)",)
    remarks = (
        f"the batch is {clip_devices(mesh)} clips of {settings.latents} latents, one per data "
        "device; more are accumulated (loop.accumulate) in the same memory",
        f"history: {rollout.history}, {config.ring_blocks - 1} past blocks seen",
        # One network is updated at a time.
        *summed_over_replicas(mesh, programs[0].held["averaged generator"]),
    )
    return Needs(compiled_for, tuple(uses), figures, 0, advice, seconds, remarks)


def _batch(config, grid, settings, mesh) -> ClipBatch:
    def array(*shape, dtype=jnp.float32):
        return jax.ShapeDtypeStruct((settings.batch_size, *shape), dtype)

    text = array(config.text_len, config.text_width)
    portrait = array(1, *grid, config.latent_channels)
    features = array(1, 4 * settings.latents, config.audio_layers, config.audio_width)
    pose = array(1, *grid, config.pose_channels)
    conditions = Conditions(
        text=text, null_text=text, reference=portrait, audio=features, pose=pose
    )
    batch = ClipBatch(conditions, array(dtype=jnp.int32))
    return placed(batch, NamedSharding(mesh, PartitionSpec(clip_axes(mesh.shape))))

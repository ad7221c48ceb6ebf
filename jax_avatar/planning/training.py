"""Device requirements of a training step, compiled on shapes for the run's own mesh.

One clip per device of "data" and "replica"; weights, optimiser and average are spread as
`models.sharding` says.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding

from jax_avatar.data.latents import LatentClips
from jax_avatar.layout import make_training_mesh, parse_training_layout
from jax_avatar.models.config import DiTConfig
from jax_avatar.models.params import abstract
from jax_avatar.models.sharding import clip_axes
from jax_avatar.planning.hardware import Hardware, stand_ins
from jax_avatar.planning.programs import AbstractModel, Program, compile_program, placed_bytes
from jax_avatar.planning.quantities import DeviceUse, Figure, Needs
from jax_avatar.planning.work import clip_flops
from jax_avatar.shapes import PyTree
from jax_avatar.training.run.placement import abstract_on, clip_devices
from jax_avatar.training.run.state import start_state
from jax_avatar.training.run.step import LoopConfig, compiled_step, make_optimiser
from jax_avatar.training.stages.flow import ForcingConfig, ForcingTask

__all__ = [
    "placed",
    "plan_training",
    "still_clips",
    "summed_over_replicas",
    "training_devices",
    "training_program",
]


def training_program(
    model: AbstractModel,
    grid: tuple[int, int],
    mesh: Mesh,
    settings: ForcingConfig,
    *,
    attention: str,
) -> Program:
    """The gradient step of diffusion forcing.

    Args:
        model: from `abstract_model`, with the window of training.
        grid: latent rows and columns.
        mesh: from `make_training_mesh`.
        settings: what is trained; the batch is one clip per device that has its own clips.
        attention: kernel, see `DiTConfig`.
    """
    motion = settings.motion_latents
    config = model.dit.config.replace(attention=attention, rematerialise=True, framepack=motion > 0)
    settings = dataclasses.replace(settings, batch_size=clip_devices(mesh))
    network = model.dit.module_class
    clips = still_clips(config, settings.latents + motion, grid)
    task = ForcingTask(config, settings, clips, network=network)
    loop, rank = LoopConfig(num_steps=1000), settings.adapter_rank
    base = abstract(lambda: network(config, rngs=nnx.Rngs(0)))[1]
    state = jax.eval_shape(
        lambda trained: start_state(trained, make_optimiser(loop)), settings.trained(base)
    )
    state, base = abstract_on(mesh, state), abstract_on(mesh, base) if rank else None
    batch = placed(task.batches(0), NamedSharding(mesh, PartitionSpec(clip_axes(mesh.shape))))
    key = placed(jax.random.key(0), NamedSharding(mesh, PartitionSpec()))
    what = "adapter" if rank else "weights"
    held = {what: state.params, f"averaged {what}": state.ema, "optimiser": state.optimiser}
    if rank:
        held = {"frozen base": base, **held}
    step = compiled_step(task, loop, mesh)
    platform = mesh.devices.flat[0].platform
    return Program("gradient step", step, (state, batch, key, base), platform, held)


def placed(tree: PyTree, sharding: Sharding) -> PyTree:
    """Shapes of a tree, all in the same place."""
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), tree
    )


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


def plan_training(
    model: AbstractModel,
    grid: tuple[int, int],
    text: str,
    hardware: Hardware,
    sections: Mapping[str, Any],
    *,
    say: Callable[[str], None] = lambda text: None,
) -> Needs:
    """Compiles the gradient step of diffusion forcing, and adds up what it needs.

    Args:
        model: from `abstract_model`.
        grid: latent rows and columns.
        text: the mesh, "8", "4x2" or "16x8x1".
        hardware: to plan for.
        sections: `model` and `task` of a config such as `configs/diffusion_forcing.py`.
        say: told what is being done, since compiling takes minutes.
    """
    model = model.resized(sections["model"])
    config = model.dit.config
    settings = ForcingConfig(**sections["task"])
    mesh, compiled_for = training_devices(text, hardware, config.num_heads)
    num_devices = mesh.size
    # Kernels take no block-causal mask; of this one, a few queries' scores are held.
    program = training_program(model, grid, mesh, settings, attention="chunked")
    stands_in = hardware.platform != program.platform
    made = compile_program(program, compiled_for, say=say, stands_in=stands_in)
    used = {name: Figure(placed_bytes(tree), "computed") for name, tree in program.held.items()}
    if not made.refused:
        used["gradients, activations, temporaries"] = Figure(float(made.temporaries), "compiled")
    limit = 1e9 * hardware.memory_gb
    use = DeviceUse("training", num_devices, used, limit, made.refused)
    advice = ()
    if limit and not use.fits:
        state = sum(figure.value for name, figure in used.items() if name in program.held)
        enough = math.ceil(2 * state * num_devices / limit)
        advice = (
            f"--mesh {max(enough, 2 * num_devices)}: the state alone fills {state / limit:.1f} of "
            f"a device's memory on {num_devices}",
        )
    frames, rank = settings.latents, settings.adapter_rank
    remarks = [
        f"the batch is {clip_devices(mesh)} clips of {frames} latents, one per data device; more "
        "are accumulated (loop.accumulate) in the same memory",
        f"adapters of rank {rank}" if rank else "all weights are trained",
        *summed_over_replicas(mesh, program.held["adapter" if rank else "weights"]),
    ]
    flops = {"training_flop": Figure(_training_flops(config, grid, frames), "computed")}
    seconds = {"step": made.seconds}
    return Needs(compiled_for, (use,), flops, 0, advice, seconds, tuple(remarks))


def _training_flops(config: DiTConfig, grid: tuple[int, int], frames: int) -> float:
    """Operations of one clip with all weights: forward, backward twice that, forward again."""
    return 4 * sum(clip_flops(config, grid, frames))


def still_clips(config: DiTConfig, frames: int, grid: tuple[int, int]) -> LatentClips:
    """One silent grey clip, for its shapes.

    Args:
        config: size of the transformer.
        frames: latent frames.
        grid: latent rows and columns.
    """
    c = config.latent_channels
    return LatentClips(
        latent=np.zeros((1, frames, *grid, c), np.float16),
        reference=np.zeros((1, 1, *grid, c), np.float16),
        features=np.zeros((1, 4 * frames, config.audio_layers, config.audio_width), np.float16),
        mouth=np.zeros((1, frames, *grid), np.float16),
        lip_gap=np.zeros((1, 4 * frames), np.float16),
        person=np.zeros(1, np.int32),
    )

"""What a training step asks of its devices: the real gradient step, compiled on shapes.

The training loop of this version runs on one device. On several, the step is compiled with its
state spread evenly over them (FSDP) and one clip per device: what such a loop would need.
"""

import math
from collections.abc import Callable

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jax_avatar.models.config import DiTConfig
from jax_avatar.planning.figures import DeviceUse, Figure, Needs
from jax_avatar.planning.hardware import Hardware, stand_ins
from jax_avatar.planning.programs import AbstractModel, Program, compile_program, placed_bytes
from jax_avatar.shapes import PyTree
from jax_avatar.streaming.mesh import Layout
from jax_avatar.training.diffusion_forcing import ForcingConfig, ForcingTask
from jax_avatar.training.latents import LatentClips
from jax_avatar.training.loop import LoopConfig, make_optimiser, make_step
from jax_avatar.training.state import start_state

__all__ = ["plan_training", "still_clips", "training_program"]


def training_program(
    model: AbstractModel, grid: tuple[int, int], devices, *, attention: str
) -> Program:
    """The gradient step of diffusion forcing, on clips as long as the window.

    Args:
        model: from `abstract_model`.
        grid: latent rows and columns.
        devices: the state is spread over them, each has one clip.
        attention: kernel, see `DiTConfig`.
    """
    config = model.dit.config.replace(attention=attention, rematerialise=True)
    settings = ForcingConfig(batch_size=len(devices), latents=config.ring_frames)
    task = ForcingTask(config, settings, still_clips(config, config.ring_frames, grid))
    loop = LoopConfig(num_steps=1000)
    mesh = Mesh(np.array(devices), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    key = jax.random.key(0)
    state = jax.eval_shape(lambda key: start_state(task.init(key), make_optimiser(loop)), key)
    state = _spread(state, mesh)
    by_clip = NamedSharding(mesh, PartitionSpec("data"))
    batch = {
        name: jax.ShapeDtypeStruct(value.shape, value.dtype, sharding=by_clip)
        for name, value in task.batches(0).items()
    }
    whole = NamedSharding(mesh, PartitionSpec())
    arguments = (state, batch, jax.ShapeDtypeStruct(key.shape, key.dtype, sharding=whole))
    held = {"weights": state.params, "averaged weights": state.ema, "optimiser": state.optimiser}
    step = make_step(task, loop)
    return Program("gradient step", step, arguments, devices[0].platform, held)


def plan_training(
    model: AbstractModel,
    grid: tuple[int, int],
    num_devices: int,
    hardware: Hardware,
    *,
    say: Callable[[str], None] = lambda text: None,
) -> Needs:
    """Compiles the gradient step of diffusion forcing, and adds up what it needs.

    Args:
        model: from `abstract_model`.
        grid: latent rows and columns.
        num_devices: to spread the state over.
        hardware: to plan for.
        say: told what is being done, since compiling takes minutes.
    """
    devices, compiled_for = stand_ins(hardware, Layout(1, num_devices, False, 1))
    devices = list(devices)[:num_devices]
    attention = "splash" if devices[0].platform == "tpu" else "xla"
    program = training_program(model, grid, devices, attention=attention)
    say(f"{program.name}: compiling for {compiled_for}")
    made = compile_program(program)
    say(f"{program.name}: {made.refused or 'compiled'}, {made.seconds:.0f} s")
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
    remarks = [f"the batch is {num_devices} clips of {model.dit.config.ring_frames} latents"]
    if num_devices > 1:
        remarks.append(
            "the training loop of this version runs on one device; see planning/training"
        )
    if attention == "xla":
        n = (model.dit.config.ring_frames + 1) * (grid[0] // 2) * (grid[1] // 2)
        scores = 4 * model.dit.config.num_heads * n**2 / 2**30
        remarks.append(
            f"temporaries hold attention scores, {scores:.1f} GiB each time (computed), which a "
            "kernel does not"
        )
    flops = {"training_flop": Figure(_training_flops(model.dit.config, grid), "computed")}
    seconds = {"step": made.seconds}
    return Needs(compiled_for, (use,), flops, 0, advice, seconds, tuple(remarks))


def _training_flops(config: DiTConfig, grid: tuple[int, int]) -> float:
    """Operations of one clip: forward, backward twice that, and forward again."""
    d, patches = config.width, (grid[0] // 2) * (grid[1] // 2)
    n, noisy = (config.ring_frames + 1) * patches, config.ring_frames * patches
    linear = 2 * n * (6 * d * d + 2 * d * config.ffn_width) + 4 * config.text_len * d * d
    attention = 4 * n * n * d + 4 * n * config.text_len * d
    audio = len(config.audio_inject_layers) * 4 * noisy * d * d
    return 4.0 * (config.num_layers * (linear + attention) + audio)


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


def _spread(tree: PyTree, mesh: Mesh) -> PyTree:
    """Every leaf cut along its longest axis that divides."""

    def place(leaf):
        axes = sorted(range(leaf.ndim), key=lambda axis: -leaf.shape[axis])
        spec = [None] * leaf.ndim
        for axis in axes:
            if leaf.shape[axis] % mesh.size == 0 and leaf.size >= 2**16:
                spec[axis] = "data"
                break
        sharding = NamedSharding(mesh, PartitionSpec(*spec))
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    return jax.tree.map(place, tree)

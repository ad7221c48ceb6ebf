"""The real step, tick and decoder of a model that has sizes but no weights.

    sizes --abstract--> shapes of weights, windows, inputs --lower--> programs to compile and weigh

Nothing is allocated: devices may be far away, or not exist yet.
"""

import math
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec, SingleDeviceSharding

from jax_avatar.layout import Layout, make_mesh, parse_layout
from jax_avatar.models.conditions import Conditions
from jax_avatar.models.config import DiTConfig
from jax_avatar.models.network import Network
from jax_avatar.models.sharding import param_shardings
from jax_avatar.models.speech.injection import AudioInjector
from jax_avatar.models.tokens import MOTION_LATENTS
from jax_avatar.shapes import PyTree
from jax_avatar.streaming.decode import make_decode
from jax_avatar.streaming.pipeline import (
    check_mesh,
    make_empty_slices,
    make_slice_prefill,
    make_tick,
    slice_inputs,
)
from jax_avatar.streaming.plan import StreamPlan
from jax_avatar.streaming.sampler import make_prefill, make_step, make_windows
from jax_avatar.weights.kinds import find_kind
from jax_avatar.weights.settings import StreamSettings

__all__ = [
    "STAND_IN_OPTIONS",
    "AbstractModel",
    "Compiled",
    "Program",
    "abstract_model",
    "compile_program",
    "count_step_flops",
    "decode_program",
    "placed_bytes",
    "step_program",
]

STAND_IN_OPTIONS = {
    "xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED",
    "xla_backend_optimization_level": 0,
    "xla_llvm_disable_expensive_passes": True,
}
"""For the compiler for CPUs in place of one for accelerators.

It orders programs for several threads, at the price of memory, where those keep within theirs. The
code is never run, so it need not be fast.
"""


@dataclass(frozen=True)
class AbstractModel:
    """Networks and settings of a model; parameters are shapes.

    Attributes:
        name: of the model.
        dit: the transformer.
        vae: the video autoencoder.
        settings: how it is streamed.
    """

    name: str
    dit: Network
    vae: Network
    settings: StreamSettings


@dataclass(frozen=True)
class Program:
    """A function and the shapes and places of its arguments.

    Attributes:
        name: for messages.
        function: jitted.
        arguments: abstract, placed on devices.
        platform: to compile for.
        held: what stays on the devices between calls, by name, placed as the arguments.
    """

    name: str
    function: Callable
    arguments: tuple
    platform: str
    held: Mapping[str, PyTree]


@dataclass(frozen=True)
class Compiled:
    """Compiler's analysis of a program, per device.

    Attributes:
        temporaries: bytes of intermediate values.
        code: bytes of the program itself.
        arguments: bytes of what it is given, as laid out in memory.
        flops: operations counted; the body of a loop counts once.
        seconds: it took to compile.
        refused: the compiler's reason where it could not, and 0 for all of the above but seconds.
    """

    temporaries: int
    code: int
    arguments: int
    flops: float
    seconds: float
    refused: str = ""


def abstract_model(config: Mapping[str, Any]) -> AbstractModel:
    """A model from the plain values of a config such as `configs/wan_s2v_14b.py`.

    Args:
        config: sections `name`, `kinds`, `dit`, `vae` and `stream`; others are not looked at.

    Raises:
        ValueError: a section is missing, or a kind or size is impossible.
    """
    missing = [key for key in ("name", "kinds", "dit", "vae", "stream") if key not in config]
    if missing:
        raise ValueError(f"the model's config lacks {missing}; see configs/wan_s2v_14b.py.")

    def network(part):
        kind = find_kind(part, config["kinds"].get(part), "the model's config")
        sizes = kind.config(**config[part])
        return Network.abstract(kind.network, sizes)

    settings = StreamSettings(**config["stream"])
    return AbstractModel(config["name"], network("dit"), network("vae"), settings)


def step_program(
    model: AbstractModel,
    grid: tuple[int, int],
    layout: Layout,
    devices,
    *,
    attention: str,
    weights: str = "",
) -> Program:
    """The tick of all slices, or the step of a single device.

    Args:
        model: from `abstract_model`.
        grid: latent rows and columns.
        layout: of the slices.
        devices: to compile for, as many as the layout needs.
        attention: kernel, see `DiTConfig`.
        weights: type of the large products, see `DiTConfig`.
    """
    config = model.dit.config.replace(attention=attention, weights=weights)
    network = Network.abstract(model.dit.module_class, config)
    plan = StreamPlan.from_settings(model.settings, 0)
    mesh, _ = make_mesh(layout, devices)
    make = _step_of_one_device if layout.is_sequential else _tick_of_slices
    return make(network, plan, _conditions(model, config, grid), mesh)


def _step_of_one_device(network, plan, conditions, mesh) -> Program:
    device, config, bare = mesh.devices[0, 0], network.config, network.without_params()
    here = SingleDeviceSharding(device)
    params, conditions = _placed((network.params, conditions), here)
    b, _, h, w, c = conditions.reference.shape
    windows = jax.eval_shape(make_windows(config, plan, (b, h, w), device))
    sink = jax.eval_shape(make_prefill(bare, device), params, conditions)
    x = jax.ShapeDtypeStruct((b, config.frames_per_block, h, w, c), config.dtype)
    noise = x if plan.sampler == "renoise" else None
    levels = (np.float32(1), np.float32(0))
    x, *inputs = _placed((x, plan.position(config, 0, 0), levels, noise), here)
    block = Conditions(pose=conditions.pose, audio=conditions.audio)
    arguments = (params, x, block, windows[0], sink, *inputs)
    held = {"weights": params, "windows": windows, "sink": sink}
    function = make_step(bare, device)
    return Program("denoising step", function, arguments, device.platform, held)


def _tick_of_slices(network, plan, conditions, mesh) -> Program:
    config, bare = network.config, network.without_params()
    check_mesh(config, plan, mesh)
    everywhere, by_stage = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in ((), ("stage",)))
    b, _, h, w, c = conditions.reference.shape
    shape = (b, config.frames_per_block, h, w, c)

    def inputs():
        audio = {0: np.zeros(conditions.audio.shape, conditions.audio.dtype)}
        noise = plan.make_new_noise(shape, config.dtype)
        return slice_inputs(plan, config, (0,) * mesh.shape["stage"], audio, noise)

    params = jax.tree.map(_placed, network.params, param_shardings(network.params, mesh))
    conditions, noise = _placed((conditions, jax.ShapeDtypeStruct(shape, config.dtype)), everywhere)
    incoming, windows = jax.eval_shape(make_empty_slices(config, plan, (b, h, w), mesh))
    sink = jax.eval_shape(make_slice_prefill(bare, mesh), params, conditions)
    tick = (
        incoming,
        windows,
        sink,
        Conditions(pose=conditions.pose),
        _placed(jax.eval_shape(inputs), by_stage),
    )
    held = {"weights": params, "windows": windows, "sink": sink}
    function, platform = make_tick(bare, mesh, plan), mesh.devices.flat[0].platform
    return Program("tick of all slices", function, (params, noise, *tick), platform, held)


def _placed(tree: PyTree, place: Any) -> PyTree:
    """Shapes of arrays, with a place."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), tree)


def decode_program(model: AbstractModel, size: tuple[int, int], device: jax.Device) -> Program:
    """Decoding program in the middle of a stream: a block, or `decode_latents` latents.

    Args:
        model: from `abstract_model`.
        size: pixel rows and columns.
        device: to compile for.
    """
    start, following = make_decode(model.vae)
    latent = _latent(model, model.vae.config.latent_grid(*size))
    portrait = jax.ShapeDtypeStruct((1, 1, *size, 3), jnp.float32)
    latents = model.settings.piece_latents(model.dit.config.frames_per_block)
    _, state = jax.eval_shape(start, model.vae.params, portrait, latent(1))
    place = SingleDeviceSharding(device)
    arguments = _placed((model.vae.params, state, latent(latents)), place)
    held = {"VAE weights": arguments[0], "VAE state": arguments[1]}
    return Program(f"VAE, decoding {latents} latents", following, arguments, device.platform, held)


def compile_program(
    program: Program,
    compiled_for: str = "",
    *,
    say: Callable[[str], None] = lambda text: None,
    stands_in: bool = False,
) -> Compiled:
    """Compiles a program and reads the compiler's analysis; a refusal is a result.

    Args:
        program: to compile.
        compiled_for: the devices, for messages.
        say: called with a line before each part, since compiling takes minutes.
        stands_in: whether a program for CPUs is made in place of one for an accelerator.
    """
    say(f"{program.name}: compiling for {compiled_for}")
    made = _compile(program, stands_in)
    say(f"{program.name}: {made.refused or 'compiled'}, {made.seconds:.0f} s")
    return made


def _compile(program: Program, stands_in: bool) -> Compiled:
    lowered = program.function.trace(*program.arguments).lower(
        lowering_platforms=(program.platform,)
    )
    began = time.perf_counter()
    try:
        compiled = lowered.compile(compiler_options=STAND_IN_OPTIONS if stands_in else None)
    except jax.errors.JaxRuntimeError as error:
        return Compiled(0, 0, 0, 0.0, time.perf_counter() - began, _refusal(error))
    memory = compiled.memory_analysis()
    return Compiled(
        memory.temp_size_in_bytes,
        memory.generated_code_size_in_bytes,
        memory.argument_size_in_bytes,
        compiled.cost_analysis().get("flops", 0.0),
        time.perf_counter() - began,
    )


def _refusal(error: Exception) -> str:
    """Compiler's refusal in one line; other errors are raised again."""
    text = str(error)
    if "should include all slice devices" in text:
        return (
            "programs on this hardware run on all devices of a slice; choose a --mesh without +1 "
            "whose devices make a whole slice, such as 4x2 or 4x4"
        )
    if "RESOURCE_EXHAUSTED" not in text:
        raise error
    needed = re.search(r"Used \S+ of \S+ hbm[^.]*\.[^.]*\.", text)
    return needed[0] if needed else text.splitlines()[0]


def placed_bytes(tree: PyTree) -> float:
    """Bytes on each device of shapes with a place."""
    leaves = jax.tree.leaves(tree)
    return float(sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in leaves))


def count_step_flops(model: AbstractModel, grid: tuple[int, int]) -> float:
    """Operations of a denoising step as XLA counts them before optimising.

    XLA counts the body of a loop once, so one and two layers are counted and the difference is
    multiplied; both inject audio, so the injections of the other layers are taken off again.

    Args:
        model: from `abstract_model`.
        grid: latent rows and columns.
    """
    whole = model.dit.config

    def count(layers):
        config = whole.replace(
            num_layers=layers,
            audio_inject_layers=tuple(range(layers)),
            unroll=layers,
            attention="xla",
        )
        small = AbstractModel(
            model.name,
            Network.abstract(model.dit.module_class, config),
            model.vae,
            model.settings,
        )
        program = step_program(
            small, grid, parse_layout("1", 1), jax.devices("cpu"), attention="xla"
        )
        return _count(program.function, program.arguments)

    one, two = count(1), count(2)
    without = whole.num_layers - len(whole.audio_inject_layers)
    return one + (whole.num_layers - 1) * (two - one) - without * _injection(whole, grid)


def _injection(config: DiTConfig, grid: tuple[int, int]) -> float:
    injector = Network.abstract(AudioInjector, config)
    t, d = config.frames_per_block, config.width
    x = jax.ShapeDtypeStruct((1, t * (grid[0] // 2) * (grid[1] // 2), d), config.dtype)
    local = jax.ShapeDtypeStruct((1, 1, t, config.num_audio_tokens + 1, d), config.dtype)
    overall = jax.ShapeDtypeStruct((1, 1, t, d), config.dtype)

    def inject(params, x, local, overall):
        return x + injector.bind(params)(x, (local, overall), None).astype(x.dtype)

    return _count(jax.jit(inject), (injector.params, x, local, overall))


def _count(function: Callable, arguments: tuple) -> float:
    return function.lower(*arguments).cost_analysis()["flops"]


def _latent(model: AbstractModel, grid: tuple[int, int]) -> Callable:
    config = model.dit.config

    def latent(frames, channels=config.latent_channels):
        return jax.ShapeDtypeStruct((1, frames, *grid, channels), config.dtype)

    return latent


def _conditions(model: AbstractModel, config: DiTConfig, grid: tuple[int, int]) -> Conditions:
    """Conditions of a stream, with the speech features of a block."""
    latent = _latent(model, grid)
    motion = config.framepack and model.settings.motion == "still"
    frames = 4 * config.frames_per_block
    audio = (1, 1, frames, config.audio_layers, config.audio_width)
    return Conditions(
        text=jax.ShapeDtypeStruct((1, config.text_len, config.text_width), config.dtype),
        reference=latent(1),
        motion=latent(MOTION_LATENTS) if motion else None,
        pose=latent(1, config.pose_channels),
        audio=jax.ShapeDtypeStruct(audio, jnp.float32),
    )

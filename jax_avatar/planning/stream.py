"""Device requirements of a stream, estimated without devices: bytes, arithmetic, time bounds.

    compiled   by the real compiler, from the real step      temporaries, operations
    computed   from shapes, formulas and published peaks     weights, windows, bounds

A bound is what no program can beat; measured times are longer. Sums over the devices of a slice
and latents between slices take time too, which is left out.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jax_avatar.layout import Layout, make_mesh
from jax_avatar.models.config import DiTConfig, WanVAEConfig
from jax_avatar.models.network import flatten
from jax_avatar.models.quantise import quantised_leaves
from jax_avatar.models.sharding import param_specs
from jax_avatar.planning.hardware import Hardware, stand_ins
from jax_avatar.planning.programs import (
    AbstractModel,
    Compiled,
    Program,
    compile_program,
    count_step_flops,
    decode_program,
    placed_bytes,
    step_program,
)
from jax_avatar.planning.quantities import DeviceUse, Figure, Needs, total_bytes
from jax_avatar.shapes import PyTree

__all__ = ["DTYPES", "compute_bound", "decode_flops", "plan_stream", "step_flops"]

DTYPES = ("bf16", "int8", "fp8")
"""Types of the weights of the large linears."""

# Weights that only make the sink and the prompt's keys and values, once per stream.
_PREFILL_ONLY = ("text_", "motion_", "blocks/cross_attention/key", "blocks/cross_attention/value")
_GUESS = 2 * 2**30  # temporaries where the compiler refused to say
_VAE_FLOP = 9.76e12  # of a latent at 400x720, published size, convolutions as the official code has


def step_flops(config: DiTConfig, height: int, width: int) -> float:
    """Floating-point operations of a step: large matrix products and attention.

    Left out are the patch projections, the audio encoder and everything elementwise.

    Args:
        config: size of the transformer.
        height: latent rows.
        width: latent columns.
    """
    d, patches = config.width, (height // 2) * (width // 2)
    n = config.frames_per_block * patches
    slots = config.cond_tokens(height, width) + config.ring_frames * patches
    self_attention = 8 * n * d * d + 4 * n * slots * d
    prompt = 4 * n * d * d + 4 * n * config.text_len * d
    feed_forward = 4 * n * d * config.ffn_width
    # Queries and output of every token; a frame's few audio tokens as keys.
    audio = 4 * n * d * d + 4 * n * (config.num_audio_tokens + 1) * d
    per_layer = self_attention + prompt + feed_forward
    return float(config.num_layers * per_layer + len(config.audio_inject_layers) * audio)


def compute_bound(
    config: DiTConfig, height: int, width: int, hardware: Hardware, dtype: str
) -> float:
    """Shortest seconds of a step's arithmetic; attention is in bf16 whatever the weights are.

    Args:
        config: size of the transformer.
        height: latent rows.
        width: latent columns.
        hardware: with published peaks.
        dtype: of the large linears' weights, one of `DTYPES`.
    """
    n, slots = _tokens(config, (height, width))
    attention = 4.0 * config.num_layers * n * slots * config.width
    linear = step_flops(config, height, width) - attention
    return attention / hardware.peak("bf16") + linear / hardware.peak(dtype)


def decode_flops(config: Any, height: int, width: int, latents: int) -> float | None:
    """Floating-point operations of decoding latents as the official code does; None if unknown.

    Args:
        config: size of the VAE; only the published one is known.
        height: latent rows.
        width: latent columns.
        latents: how many, none of them the first of a clip.
    """
    if not isinstance(config, WanVAEConfig):
        return None
    if config != WanVAEConfig(dtype=config.dtype, param_dtype=config.param_dtype):
        return None
    return _VAE_FLOP / (400 * 720) * 64 * height * width * latents


def plan_stream(
    model: AbstractModel,
    size: tuple[int, int],
    layout: Layout,
    hardware: Hardware,
    *,
    dtype: str = "bf16",
    parts: tuple[str, ...] = ("step", "decode"),
    say: Callable[[str], None] = lambda text: None,
) -> Needs:
    """Compiles the step and the decoder of a stream, and adds up what they need.

    Args:
        model: from `abstract_model`.
        size: pixel rows and columns.
        layout: from `parse_layout`.
        hardware: to plan for.
        dtype: of the large linears' weights, one of `DTYPES`.
        parts: what to compile, "step" and "decode"; temporaries of the others are missing.
        say: called with a line before each part, since compiling takes minutes.

    Raises:
        ValueError: the layout does not fit the transformer, or the VAE makes no such pictures.
    """
    grid = model.vae.config.latent_grid(*size)
    devices, compiled_for = stand_ins(hardware, lambda devices: make_mesh(layout, devices))
    _, vae_device = make_mesh(layout, devices)
    attention = "splash" if devices[0].platform == "tpu" else "xla"
    weights = "" if dtype == "bf16" else dtype
    programs = {
        "step": step_program(model, grid, layout, devices, attention=attention, weights=weights),
        "decode": decode_program(model, size, vae_device),
    }
    made = {
        part: compile_program(program, compiled_for, say=say)
        for part, program in programs.items()
        if part in parts
    }
    held = {part: _held(program.held) for part, program in programs.items()}
    scores = 0.0
    if hardware.platform == "gpu":
        scores = _score_bytes(model.dit.config, grid) / layout.stage_devices
    working = {part: _working(made.get(part), scores * (part == "step")) for part in programs}
    uses = _uses(made, held, working, layout, 1e9 * hardware.memory_gb)
    figures = _arithmetic(model, grid, made)
    figures |= _bounds(model, grid, programs, held, figures, layout, hardware, dtype)
    widths = _widths(model, programs["step"], uses, layout, hardware)
    advice = _advice(model, uses, figures, widths, layout, hardware, dtype)
    compile_s = {part: result.seconds for part, result in made.items()}
    missing = ", ".join(part for part in programs if part not in made)
    remarks = (f"not compiled, so temporaries are missing: {missing}",) if missing else ()
    return Needs(compiled_for, uses, figures, model.settings.fps, advice, compile_s, remarks)


# ---- bytes ------------------------------------------------------------------------------


def _uses(made, held, working, layout: Layout, limit: float) -> tuple[DeviceUse, ...]:
    """Devices by what they do."""

    def use(role, count, *parts):
        # One program runs at a time.
        larger = max((working[part] for part in parts), key=total_bytes)
        kept = {name: figure for part in parts for name, figure in held[part].items()}
        reasons = [made[part].refused for part in parts if part in made and made[part].refused]
        return DeviceUse(role, count, kept | larger, limit, "; ".join(reasons))

    count = layout.stages * layout.stage_devices
    if layout.has_vae_slice:
        return use("denoising", count, "step"), use("VAE", 1, "decode")
    last = use("denoising and VAE", 1, "step", "decode")
    return (use("denoising", count - 1, "step"), last) if count > 1 else (last,)


def _held(trees: Mapping[str, PyTree]) -> dict[str, Figure]:
    figures = {}
    for name, tree in trees.items():
        size = placed_bytes(tree)
        # The renewed sink is made while the old one is still in use.
        name, size = ("sink, old and renewed", 2 * size) if name == "sink" else (name, size)
        figures[name] = Figure(size, "computed")
    return figures


def _weight_bytes(params: PyTree, skip: tuple[str, ...] = ()) -> float:
    """Bytes of weights on each device, those under the paths `skip` left out."""
    kept = {path: x for path, x in flatten(params).items() if not path.startswith(skip)}
    return placed_bytes(kept)


def _working(made: Compiled | None, scores: float) -> dict[str, Figure]:
    if made is None or made.refused:
        return {}
    figures = {"temporaries": Figure(max(0.0, made.temporaries - scores), "compiled")}
    return figures | ({"program": Figure(float(made.code), "compiled")} if made.code else {})


def _score_bytes(config: DiTConfig, grid: tuple[int, int]) -> float:
    """Attention scores that XLA holds on a CPU, and cuDNN does not on a GPU."""
    n, slots = _tokens(config, grid)
    return 4.0 * config.num_heads * n * slots


def _tokens(config: DiTConfig, grid: tuple[int, int]) -> tuple[int, int]:
    """Tokens of a block, and slots of its window."""
    patches = (grid[0] // 2) * (grid[1] // 2)
    slots = config.cond_tokens(*grid) + config.ring_frames * patches
    return config.frames_per_block * patches, slots


# ---- arithmetic and time ----------------------------------------------------------------


def _arithmetic(
    model: AbstractModel, grid: tuple[int, int], made: Mapping[str, Compiled]
) -> dict[str, Figure]:
    figures = {
        "step_flop": Figure(step_flops(model.dit.config, *grid), "computed"),
        "step_flop_counted": Figure(count_step_flops(model, grid), "compiled"),
    }
    decode = decode_flops(model.vae.config, *grid, model.dit.config.frames_per_block)
    if decode is not None:
        figures["decode_flop"] = Figure(decode, "computed")
    if "decode" in made and made["decode"].flops:
        flop = made["decode"].flops * _decodes(model)
        figures["decode_flop_counted"] = Figure(flop, "compiled")
    return figures


def _decodes(model: AbstractModel) -> int:
    """Calls of the decoder for a block."""
    block = model.dit.config.frames_per_block
    return block // model.settings.piece_latents(block)


def _bounds(model, grid, programs, held, figures, layout, hardware, dtype) -> dict[str, Figure]:
    """Shortest times that the published peaks allow; nothing where they are unknown."""
    if not hardware.tflops:
        return {}
    config = model.dit.config
    wide = layout.stage_devices
    compute = compute_bound(config, *grid, hardware, dtype) / wide
    own = programs["step"].held
    settings, stages = model.settings, layout.stages
    windows = held["step"]["windows"].value / (settings.num_windows // stages)
    read = _weight_bytes(own["weights"], _PREFILL_ONLY) + windows + placed_bytes(own["sink"])
    bandwidth = 1e9 * hardware.bandwidth_gb_s
    step = max(compute, read / bandwidth)
    flop = figures.get("decode_flop_counted", figures.get("decode_flop", Figure(0.0, "computed")))
    vae = held["decode"]
    moved = _decodes(model) * (vae["VAE weights"].value + 2 * vae["VAE state"].value)
    decode = max(flop.value / hardware.peak("bf16"), moved / bandwidth)
    tick = settings.num_evaluations // stages * step
    # Slices take turns with different blocks; the VAE's own slice works beside them.
    period = max(tick, decode) if layout.has_vae_slice else tick + decode
    frames = 4 * config.frames_per_block
    values = {
        "step_compute_s": compute,
        "step_bandwidth_s": read / bandwidth,
        "step_s": step,
        "decode_s": decode,
        "block_period_s": period,
        "fps": frames / period,
        "first_frame_s": settings.num_evaluations * step + decode / _decodes(model),
    }
    return {name: Figure(value, "computed") for name, value in values.items()}


# ---- what to change ---------------------------------------------------------------------


def _widths(
    model: AbstractModel, step: Program, uses: Sequence[DeviceUse], layout: Layout, hardware
) -> dict[tuple[int, str], float]:
    """Bytes of a denoising device by devices per slice and type of weights."""
    plain = flatten(model.dit.params)
    leaves = {"bf16": plain} | {d: quantised_leaves(plain, d) for d in DTYPES if d != "bf16"}
    specs = flatten(param_specs(model.dit.params, {"model": 2}))
    used = uses[0].bytes
    other = sum(f.value for name, f in used.items() if name not in ("weights", "program"))
    if "temporaries" not in used:
        other += _GUESS
    config, sizes = model.dit.config, {}
    for width in (1, 2, 4, 8, 16, 20, 40):
        if config.num_heads % width or config.ffn_width % width:
            continue
        for dtype in ("bf16", *(d for d in DTYPES if d in hardware.tflops and d != "bf16")):
            weights = sum(
                math.prod(leaf.shape)
                * leaf.dtype.itemsize
                / (width if "model" in specs.get(path, ()) else 1)
                for path, leaf in leaves[dtype].items()
            )
            rest = other * layout.stage_devices / width
            if layout.is_sequential:  # a slice of its own for every step
                rest -= used["windows"].value * (1 - 1 / model.settings.num_windows) / width
            sizes[width, dtype] = weights + rest
    return sizes


def _advice(model, uses, figures, widths, layout, hardware, dtype) -> tuple[str, ...]:
    advice = []
    limit = 1e9 * hardware.memory_gb
    # With one history for all steps there is one window, and blocks follow one another.
    stages = model.settings.num_windows if layout.is_sequential else layout.stages
    evaluations = model.settings.num_evaluations // layout.stages
    suffix = "+1" if layout.has_vae_slice or layout.is_sequential else ""
    denoising, last = uses[0], uses[-1]
    if not denoising.fits or not (layout.has_vae_slice or last.fits):
        extra = last.total - denoising.total if last is not denoising else 0.0
        room = limit - (0.0 if layout.has_vae_slice else extra)
        advice += _narrowest(widths, room, layout, dtype, f"{stages}x{{}}{suffix}")
    if layout.has_vae_slice and not last.fits:
        advice.append(
            f"the VAE's device needs {last.total / limit:.1f} times its memory: choose a --size of "
            f"at most {0.95 * limit / last.total:.0%} of the area"
            if not last.refused
            else "the VAE's device is too small: choose a smaller --size"
        )
    fps = figures.get("fps")
    if fps and fps.value < model.settings.fps:
        more = f"{stages}x{2 * layout.stage_devices}{suffix}"
        if layout.is_sequential and stages > 1:
            what = f"a slice for every step (--mesh {stages + 1})"
        elif figures["decode_s"].value > evaluations * figures["step_s"].value:
            what = "a smaller --size, since the VAE is what takes long"
        else:
            what = f"more devices per slice (--mesh {more})"
        advice.append(
            f"at most {fps.value:.1f} of {model.settings.fps} frames per second: choose {what}"
        )
    return tuple(advice)


def _narrowest(widths, limit: float, layout: Layout, dtype: str, mesh: str) -> list[str]:
    """The narrowest slice that has room, for each type of weights."""
    advice = {}
    for (width, kind), size in widths.items():
        is_this = (width, kind) == (layout.stage_devices, dtype) and not layout.is_sequential
        if kind not in advice and size <= 0.95 * limit and not is_this:
            advice[kind] = (
                f"--mesh {mesh.format(width)} --dtype {kind}: {size / 2**30:.1f} GiB per denoising "
                "device (computed; temporaries scaled from this plan)"
            )
    return list(advice.values()) or ["no slice is wide enough: choose a smaller --size"]

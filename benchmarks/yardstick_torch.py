"""The shapes of `dit_step.py` and `vae_decode.py` in plain PyTorch: the yardstick of a machine.

    python benchmarks/yardstick_torch.py                        14B step, on the GPU if there is one
    python benchmarks/yardstick_torch.py --network vae
    python benchmarks/yardstick_torch.py --attention cudnn
    python benchmarks/yardstick_torch.py --tiny                 seconds, on any CPU

Weights and inputs are random. `against_torch.py` shows that the same code gives our numbers. Needs
`pip install torch`; JAX only counts shapes here, on the CPU.
"""

import argparse
import importlib
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

if __name__ == "__main__":
    os.environ["JAX_PLATFORMS"] = "cpu"  # so that JAX leaves the GPU's memory to PyTorch

import numpy as np

from benchmarks.common import emit, environment, measure, quantiles
from benchmarks.device import latent_grid, official_shapes, share_of_peak, speed
from benchmarks.dit_step import CONFIGS, shrink
from benchmarks.vae_decode import TINY
from conversion.wan_dit import TABLE as DIT_TABLE
from conversion.wan_vae import TABLE as VAE_TABLE
from jax_avatar.models.cache import block_position
from jax_avatar.models.config import DiTConfig, WanVAEConfig
from jax_avatar.models.dit import DiT
from jax_avatar.models.network import Network, flatten
from jax_avatar.models.vae.wan import WanVAE
from jax_avatar.planning.stream import compute_bound, decode_flops, step_flops
from launch import cli

_BACKENDS = {
    "flash": "FLASH_ATTENTION",
    "cudnn": "CUDNN_ATTENTION",
    "efficient": "EFFICIENT_ATTENTION",
    "math": "MATH",
}


def parse_arguments(argv=None) -> argparse.Namespace:
    parser = cli.Parser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--network", choices=("dit", "vae"), default="dit", help="the step, or the decoding")
    add("--config", choices=("nano", "14b"), default="14b", help="size of the transformer")
    add("--tiny", action="store_true", help="very small networks")
    add("--size", default=None, help=f"{cli.SIZE}; the config's usual if None")
    add("--layers", type=int, default=None, help="fewer layers, for a device with less memory")
    add("--attention", choices=("auto", *_BACKENDS), default="auto", help="PyTorch's backend")
    add("--layout", choices=("contiguous", "channels_last"), default="contiguous", help="VAE only")
    add("--compile", action="store_true", help="through torch.compile")
    add("--repeats", type=int, default=20, help="calls to time")
    add("--out", default=None, help="JSON file to write")
    return parser.parse_args(argv)


def load_torch() -> Any:
    """The module.

    Raises:
        ValueError: it is not installed.
    """
    try:
        return importlib.import_module("torch")
    except ImportError:
        raise ValueError(
            "PyTorch is not installed; it is needed for this yardstick only: "
            'pip install -e ".[torch]"'
        ) from None


def step_inputs(config: DiTConfig, grid, inputs, sink, window) -> Iterator[tuple[str, np.ndarray]]:
    """Our inputs of a step, by the names and in the layouts of `TorchStep`."""
    from benchmarks.torch_dit import rotations

    for name, x in (("latent", inputs.latent), ("pose", inputs.conditions.pose)):
        yield name, np.moveaxis(np.asarray(x), -1, 1)
    yield "audio", np.asarray(inputs.audio)[0, 0]
    own, cond = rotations(config, grid, inputs.position)
    yield from (("own", own), ("cond", cond), ("sink_key", sink.key), ("sink_value", sink.value))
    yield from (("text_key", sink.text_key), ("text_value", sink.text_value))
    yield from (("key", window.key), ("value", window.value))


def random_weights(torch, leaves, table, dtype, device) -> dict[str, Any]:
    """Official name -> random tensor, drawn where it stays."""
    return {
        name: torch.ones(shape, dtype=dtype, device=device)
        if name.endswith(("norm_q.weight", "norm_k.weight", "norm3.weight", "gamma"))
        else 0.02 * torch.randn(shape, dtype=dtype, device=device)
        for name, shape in official_shapes(leaves, table).items()
    }


def make_step(torch, config: DiTConfig, grid: tuple[int, int], device):
    """A step of random numbers and a full window."""
    from benchmarks.torch_dit import TorchStep, rotations

    dtype = getattr(torch, str(config.dtype))
    leaves = flatten(Network.abstract(DiT, config).params)
    weights = random_weights(torch, leaves, DIT_TABLE, dtype, device)
    patches = (grid[0] // 2) * (grid[1] // 2)
    cond = config.cond_tokens(*grid)
    slots = cond + config.ring_frames * patches

    def draw(*shape):
        return torch.randn(shape, dtype=dtype, device=device)

    def layers(count):
        # Layer by layer, so that nothing of a window's size is held twice.
        shape = (1, count, config.num_heads, config.head_dim)
        return [draw(*shape) for _ in range(config.num_layers)]

    position = block_position(config, config.ring_blocks, 10)
    frames = config.frames_per_block
    turns = (
        torch.from_numpy(turn.astype(np.complex64)).to(device)
        for turn in rotations(config, grid, position)
    )
    inputs = dict(zip(("own", "cond"), turns, strict=True))
    inputs |= {name: layers(cond) for name in ("sink_key", "sink_value")}
    inputs |= {name: layers(config.text_len) for name in ("text_key", "text_value")}
    inputs |= {name: layers(slots) for name in ("key", "value")}
    inputs |= {
        "latent": draw(1, config.latent_channels, frames, *grid),
        "pose": draw(1, config.pose_channels, frames, *grid),
        "audio": draw(4 * frames, config.audio_layers, config.audio_width),
        "slot": int(position.slot),
        "sigma": 1.0,
        "next_sigma": 0.9,
    }
    shapes = {
        "latent": [1, frames, *grid, config.latent_channels],
        "tokens": frames * patches,
        "window": slots,
        "prompt": config.text_len,
        "width": config.width,
        "layers": config.num_layers,
    }
    return TorchStep(config, weights, inputs), weights, shapes


def make_decoding(torch, config: WanVAEConfig, grid: tuple[int, int], device, layout: str):
    """The decoding of a block in the middle of a stream of random numbers."""
    from benchmarks.torch_vae import TorchDecoder

    dtype = getattr(torch, str(config.dtype))
    leaves = flatten(Network.abstract(WanVAE, config).params)
    weights = random_weights(torch, leaves, VAE_TABLE, dtype, device)
    memory = torch.channels_last_3d if layout == "channels_last" else torch.contiguous_format
    decoder = TorchDecoder(config, weights, memory)
    latents = torch.randn((1, config.z_dim, 4, *grid), dtype=dtype, device=device)
    decoder(latents[:, :, :1])
    shapes = {
        "latent": [1, 3, *grid, config.z_dim],
        "pixels": [1, 12, 8 * grid[0], 8 * grid[1], 3],
        "dim": config.dim,
    }
    return decoder, latents[:, :, 1:].contiguous(memory_format=memory), weights, shapes


def run(torch, arguments: argparse.Namespace) -> dict:
    """Times the step or the decoding that the arguments ask for."""
    is_gpu = torch.cuda.is_available()
    device = torch.device("cuda" if is_gpu else "cpu")
    name = "nano" if arguments.tiny else arguments.config
    usual = CONFIGS[name][2]
    grid = latent_grid(arguments.size or usual)
    began = time.perf_counter()
    if arguments.network == "dit":
        config = shrink(CONFIGS[name][1](), arguments.layers)
        call, weights, shapes = make_step(torch, config, grid, device)
        flops = step_flops(config, *grid)
        bound = lambda hardware: compute_bound(config, *grid, hardware, "bf16")  # noqa: E731
    else:
        dtype = "float32" if arguments.tiny else "bfloat16"
        config = (TINY if arguments.tiny else WanVAEConfig()).replace(dtype=dtype)
        decoder, latent, weights, shapes = make_decoding(
            torch, config, grid, device, arguments.layout
        )
        call = lambda: decoder(latent)  # noqa: E731
        flops = decode_flops(config, *grid, 3)
        bound = lambda hardware: (flops or 0) / hardware.peak("bf16")  # noqa: E731
    made = time.perf_counter() - began
    if arguments.compile:
        call = torch.compile(call)

    def once():
        with _attention(torch, arguments.attention):
            result = call()
        if is_gpu:
            torch.cuda.synchronize()
        return result

    began = time.perf_counter()
    once()
    first = time.perf_counter() - began
    once()
    times = measure(once, arguments.repeats)
    kind = torch.cuda.get_device_name() if is_gpu else "cpu"
    peak = round(torch.cuda.max_memory_allocated() / 2**30, 3) if is_gpu else None
    return {
        "framework": "torch",
        "config": name if arguments.network == "dit" else "tiny" if arguments.tiny else "wan",
        "size": f"{8 * grid[0]}*{8 * grid[1]}",
        "dtype": str(config.dtype),
        "weights": str(config.dtype),
        "parameters": sum(w.numel() for w in weights.values()),
        "shapes": shapes,
        "attention": {"asked": arguments.attention},
        "make_weights_s": round(made, 2),
        "compile_s": round(first, 2),
        "step": quantiles(times),
        **speed(times, flops),
        **share_of_peak(kind, times, bound),
        "memory": {
            "weights_gib": round(sum(w.nbytes for w in weights.values()) / 2**30, 3),
            "peak_gib": peak,
        },
        **_surroundings(torch, kind, is_gpu),
    }


def _surroundings(torch, kind: str, is_gpu: bool) -> dict:
    found = environment(device=kind, platform="gpu" if is_gpu else "cpu")
    found["versions"] |= {"torch": torch.__version__}
    return found | {"threads": torch.get_num_threads()}


def _attention(torch, name: str):
    from torch.nn.attention import SDPBackend, sdpa_kernel

    if name == "auto":
        return torch.no_grad()
    return sdpa_kernel(getattr(SDPBackend, _BACKENDS[name]))


def main(argv=None) -> dict:
    arguments = parse_arguments(argv)
    torch = load_torch()
    benchmark = {"dit": "dit_step", "vae": "vae_decode"}[arguments.network]
    return emit({"benchmark": benchmark, **run(torch, arguments)}, arguments.out)


if __name__ == "__main__":
    cli.run(main)

"""The Wan VAE's decoding of a block of a stream, random weights: time, arithmetic, memory.

    python benchmarks/vae_decode.py                  published size, 12 frames of 384*704
    python benchmarks/vae_decode.py --size 720*400
    python benchmarks/vae_decode.py --tiny           seconds, on any CPU

Three latents become twelve frames of 8-bit pixels, with the state of the blocks before, as in a
stream from its second block on.
"""

import argparse
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.common import emit, environment, measure, quantiles
from benchmarks.device import (
    custom_calls,
    latent_grid,
    memory_use,
    random_params,
    share_of_peak,
    speed,
    weight_bytes,
)
from jax_avatar.models.config import WanVAEConfig
from jax_avatar.models.network import Network
from jax_avatar.models.vae.wan import WanVAE
from jax_avatar.planning.stream import decode_flops
from jax_avatar.streaming.decode import make_decode
from launch import cli

_BLOCK = 3  # latents
TINY = WanVAEConfig(dim=8, dim_mult=(1, 1, 2, 2), num_res_blocks=1)


# The long spellings are those until 0.1.
_DTYPES = {"bf16": "bfloat16", "f32": "float32", "bfloat16": "bfloat16", "float32": "float32"}


def parse_arguments(argv=None) -> argparse.Namespace:
    parser = cli.Parser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--tiny", action="store_true", help="eight channels and 64*64 pixels")
    add("--size", default=None, help=f"{cli.SIZE}; 384*704 if None")
    add("--dtype", choices=list(_DTYPES), default=None, help="of the weights; bf16 if not --tiny")
    add("--repeats", type=int, default=20, help="blocks to time")
    add("--out", default=None, help="JSON file to write")
    return parser.parse_args(argv)


class Decoding:
    """A decoder in the middle of a stream, with random weights and latents.

    Attributes:
        network: the VAE.
        latent: of one block.
        state: what the blocks before left.
        program: compiled `(params, state, latent) -> (pixels, is_finite, state)`.
        compile_s: seconds it took to compile.
        flops: operations as XLA counts them before optimising.
    """

    def __init__(self, config: WanVAEConfig, grid: tuple[int, int], seed: int = 0):
        network = Network.abstract(WanVAE, config)
        self.network = network.with_params(random_params(network.params, seed))
        jax.block_until_ready(self.network.params)
        draw = np.random.default_rng(seed).standard_normal
        latents = draw((1, 1 + _BLOCK, *grid, config.z_dim), np.float32)
        self.latent = jnp.asarray(latents[:, 1:], config.dtype)
        self.first_latent = jnp.asarray(latents[:, :1], config.dtype)
        start, following = make_decode(network)
        portrait = jnp.zeros((1, 1, *(config.spatial_stride * side for side in grid), 3))
        _, self.state = start(self.network.params, portrait, self.first_latent)
        began = time.perf_counter()
        lowered = following.lower(self.network.params, self.state, self.latent)
        self.program = lowered.compile()
        self.compile_s = time.perf_counter() - began
        self.flops = (lowered.cost_analysis() or {}).get("flops")

    def __call__(self) -> jax.Array:
        """The next block's pixels."""
        pixels, _, self.state = self.program(self.network.params, self.state, self.latent)
        return pixels


def run(config: WanVAEConfig, size: str, repeats: int) -> dict:
    """Times the decoding of a block.

    Args:
        config: size of the VAE.
        size: of the video, "HEIGHT*WIDTH".
        repeats: blocks to time.
    """
    grid = latent_grid(size)
    decode = Decoding(config, grid)
    held = {"weights": weight_bytes(decode.network.params), "state": weight_bytes(decode.state)}
    for _ in range(2):
        pixels = jax.block_until_ready(decode())
    times = measure(decode, repeats)
    official = decode_flops(config, *grid, _BLOCK)
    return {
        "framework": "jax",
        "size": f"{8 * grid[0]}*{8 * grid[1]}",
        "dtype": str(config.dtype),
        "weights": str(config.param_dtype),
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(decode.network.params)),
        "shapes": {
            "latent": list(decode.latent.shape),
            "pixels": list(pixels.shape),
            "dim": config.dim,
        },
        "attention": {"frame": "xla"},  # one head, wider than kernels take
        "custom_calls": custom_calls(decode.program),
        "compile_s": round(decode.compile_s, 2),
        "step": quantiles(times),
        **speed(times, decode.flops),
        # Fewer are needed than the official code's, which convolves enlarged pictures.
        "tflop_official": round(official / 1e12, 6) if official else None,
        **share_of_peak(
            jax.devices()[0].device_kind,
            times,
            lambda hardware: decode.flops / hardware.peak("bf16"),
        ),
        "fps": round(pixels.shape[1] / float(np.median(times)), 3),
        "memory": memory_use(decode.program, **held),
    }


def main(argv=None) -> dict:
    arguments = parse_arguments(argv)
    config = TINY if arguments.tiny else WanVAEConfig()
    dtype = _DTYPES[arguments.dtype or ("f32" if arguments.tiny else "bf16")]
    config = config.replace(dtype=dtype, param_dtype=dtype)
    size = arguments.size or ("64*64" if arguments.tiny else "384*704")
    record = {
        "benchmark": "vae_decode",
        "config": "tiny" if arguments.tiny else "wan",
        **run(config, size, arguments.repeats),
        **environment(),
    }
    return emit(record, arguments.out)


if __name__ == "__main__":
    cli.run(main)

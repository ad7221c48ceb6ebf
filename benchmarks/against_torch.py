"""Our streaming step and our VAE's decoding beside PyTorch's, in one process, in turn.

    python benchmarks/against_torch.py              a middle size, minutes on two cores
    python benchmarks/against_torch.py --tiny       seconds

Both have the same weights, inputs and threads, and must give the same numbers before they are
timed. The ratio is PyTorch's time over ours, so above 1 we are faster. It is taken within each
round, since other work on the machine changes from round to round. Needs `pip install torch`.
"""

import argparse
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.common import emit, environment, measure, quantiles
from benchmarks.dit_step import Step, random_inputs
from benchmarks.vae_decode import TINY, Decoding
from benchmarks.yardstick_torch import load_torch, step_inputs
from conversion.rules import export
from conversion.wan_dit import TABLE as DIT_TABLE
from conversion.wan_vae import TABLE as VAE_TABLE
from jax_avatar.models.cache import empty_cache
from jax_avatar.models.config import DiTConfig, WanVAEConfig
from jax_avatar.models.dit import DiT
from jax_avatar.models.network import flatten
from jax_avatar.streaming.sampler import make_prefill
from jax_avatar.testing import NANO
from launch import cli

MIDDLE = DiTConfig(
    width=512,
    ffn_width=1408,
    num_heads=4,
    num_layers=4,
    text_width=256,
    text_len=128,
    audio_width=256,
    audio_layers=4,
    audio_inject_layers=(0, 2),
)
"""The 14B in small: heads of 128 channels, motion tokens, audio in every other layer."""

SIZES = {
    False: (MIDDLE, (24, 24), WanVAEConfig(dim=32), (12, 12)),
    True: (NANO, (8, 8), TINY, (8, 8)),
}
_TOLERANCE = 1e-3
_PAUSE = 0.3  # seconds, for threads that wait in a loop to fall asleep


def parse_arguments(argv=None) -> argparse.Namespace:
    parser = cli.Parser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--tiny", action="store_true", help="very small networks")
    add("--threads", type=int, default=None, help="for each; all that may be used if not given")
    add("--rounds", type=int, default=7, help="rounds of both in turn")
    add("--repeats", type=int, default=5, help="calls of each per round")
    add("--out", default=None, help="JSON file to write")
    return parser.parse_args(argv)


def limit_threads(threads: int | None) -> int:
    """Keeps this process to so many CPUs, which XLA takes as its number of threads.

    Raises:
        ValueError: there are fewer, or the system cannot.
    """
    # Otherwise threads that have nothing to do keep the cores busy while the other side runs.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if not hasattr(os, "sched_getaffinity"):
        if threads:
            raise ValueError("--threads: this system cannot keep a process to some CPUs.")
        return os.cpu_count()
    usable = sorted(os.sched_getaffinity(0))
    threads = threads or len(usable)
    if not 1 <= threads <= len(usable):
        raise ValueError(f"--threads {threads}: {len(usable)} CPUs may be used here.")
    os.sched_setaffinity(0, usable[:threads])
    return threads


def step_pair(torch, config: DiTConfig, grid: tuple[int, int]) -> tuple[Callable, Callable, dict]:
    """Our step, PyTorch's, and how far they are apart."""
    from benchmarks.torch_dit import TorchStep

    inputs = random_inputs(DiT, config, grid, spread=0.08)
    network = inputs.network
    sink = make_prefill(network.without_params(), jax.devices()[0])(
        network.params, inputs.conditions
    )
    empty = empty_cache(config, 1, *grid)
    window = jax.tree.map(
        lambda x: jnp.asarray(np.random.default_rng(1).standard_normal(x.shape, np.float32)), empty
    )
    arrays = {name: np.array(x) for name, x in step_inputs(config, grid, inputs, sink, window)}
    numbers = {"slot": int(inputs.position.slot)}
    numbers |= dict(zip(("sigma", "next_sigma"), map(float, inputs.sigmas), strict=True))
    weights = export(flatten(jax.tree.map(np.asarray, network.params)), DIT_TABLE)
    theirs = TorchStep(
        config,
        {name: torch.from_numpy(np.array(w)) for name, w in weights.items()},
        {name: torch.from_numpy(x) for name, x in arrays.items()} | numbers,
    )
    ours = Step(inputs, window, sink)
    expected = np.moveaxis(theirs().numpy(), 1, -1)
    got = np.asarray(ours())
    moved = float(np.abs(got - np.asarray(inputs.latent)).max())
    return ours, theirs, agreement_of("denoising step", got, expected, moved)


def decode_pair(torch, config: WanVAEConfig, grid: tuple[int, int]):
    """Our decoding of a block, PyTorch's, and how far they are apart."""
    from benchmarks.torch_vae import TorchDecoder

    ours = Decoding(config, grid)
    weights = export(flatten(jax.tree.map(np.asarray, ours.network.params)), VAE_TABLE)
    weights = {name: torch.from_numpy(np.array(w)) for name, w in weights.items()}
    theirs = TorchDecoder(config, weights)
    first, latent = (
        torch.from_numpy(np.moveaxis(np.array(x), -1, 1).copy())
        for x in (ours.first_latent, ours.latent)
    )
    theirs(first)
    state, vae = ours.state, ours.network.bind()
    got = np.asarray(jax.jit(vae.decode_next)(state, ours.latent)[0])
    expected = np.moveaxis(theirs.decode(latent).numpy(), 1, -1)
    agreement = agreement_of("decoder", got, expected, float(np.abs(got).max()))
    return ours, lambda: theirs(latent), agreement


def agreement_of(name: str, got: np.ndarray, expected: np.ndarray, scale: float) -> dict:
    if got.shape != expected.shape:
        raise ValueError(f"{name}: ours makes {got.shape}, PyTorch {expected.shape}.")
    error = float(np.abs(got - expected).max())
    if not error <= _TOLERANCE * max(1.0, scale):
        raise ValueError(
            f"{name}: ours and PyTorch differ by {error:.2g} of {scale:.2g}; the yardstick must "
            "compute the same before it is timed."
        )
    return {"output": list(got.shape), "largest": round(scale, 4), "max_error": error}


def compare(ours: Callable, theirs: Callable, rounds: int, repeats: int) -> dict:
    """Times both in turn, the order turned round every time.

    Args:
        ours: a call of our program.
        theirs: of PyTorch's.
        rounds: how often to change over.
        repeats: calls per round.
    """
    calls, times = {"ours": ours, "torch": theirs}, {"ours": [], "torch": []}
    measure(ours, 2), measure(theirs, 2)
    for number in range(rounds):
        for name in list(calls)[:: 1 if number % 2 else -1]:
            time.sleep(_PAUSE)
            measure(calls[name], 1)
            times[name].append(measure(calls[name], repeats))
    medians = {name: np.median(value, axis=1) for name, value in times.items()}
    ratios = medians["torch"] / medians["ours"]
    best = {name: min(min(one) for one in value) for name, value in times.items()}
    return {
        "ratio": round(float(np.median(ratios)), 3),
        "ratio_of_shortest": round(best["torch"] / best["ours"], 3),
        "ratio_by_round": [round(float(ratio), 3) for ratio in ratios],
        **{name: quantiles(np.ravel(value)) for name, value in times.items()},
    }


def main(argv=None) -> dict:
    arguments = parse_arguments(argv)
    threads = limit_threads(arguments.threads)
    torch = load_torch()
    torch.set_num_threads(threads)
    config, grid, vae, vae_grid = SIZES[arguments.tiny]
    result = {}
    for name, make, sizes in (
        ("dit_step", step_pair, (config, grid)),
        ("vae_decode", decode_pair, (vae, vae_grid)),
    ):
        ours, theirs, agreement = make(torch, *sizes)
        result[name] = {
            "size": f"{8 * sizes[1][0]}*{8 * sizes[1][1]}",
            "agreement": agreement,
            **compare(ours, theirs, arguments.rounds, arguments.repeats),
        }
    surroundings = environment()
    surroundings["versions"]["torch"] = torch.__version__
    record = {
        "benchmark": "against_torch",
        "config": "tiny" if arguments.tiny else "middle",
        "dtype": "float32",
        "threads": threads,
        "rounds": arguments.rounds,
        **result,
        **surroundings,
    }
    return emit(record, arguments.out)


if __name__ == "__main__":
    cli.run(main)

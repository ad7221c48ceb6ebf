"""Accuracy of eight-bit weights, layer by layer.

    python benchmarks/quantised.py                            the golden models of the official code
    python benchmarks/quantised.py --checkpoint MODEL/dit     a converted transformer

One streaming block with an empty window, in full precision and with rounded products: relative
error and cosine of what every layer adds to the hidden states, and of the velocity.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import itertools

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.common import emit, environment
from conversion.readers import SafetensorsFile
from conversion.rules import convert
from conversion.wan_dit import TABLE, config_from_official
from jax_avatar.models.cache import block_position, empty_cache
from jax_avatar.models.conditions import Conditions
from jax_avatar.models.config import DiTConfig
from jax_avatar.models.dit import DiT
from jax_avatar.models.network import Network, flatten, unflatten
from jax_avatar.models.quantise import quantise_params
from jax_avatar.models.tap import record
from jax_avatar.weights.fields import fill_fields
from jax_avatar.weights.orbax import StoredWeights
from launch import cli

GOLDEN = Path(__file__).parents[1] / "tests" / "golden" / "dit"


def parse_arguments(argv=None) -> argparse.Namespace:
    parser = cli.Parser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--golden", type=Path, default=GOLDEN, help="folder of golden files")
    add("--checkpoint", type=Path, default=None, help="one converted transformer instead")
    add("--grid", type=int, default=16, help="latent rows and columns")
    add("--out", default=None, help="JSON file to write")
    return parser.parse_args(argv)


def golden_models(folder: Path):
    """Name, config and parameters of every golden transformer."""
    import json

    for path in sorted(folder.glob("*.safetensors")):
        file = SafetensorsFile(path)
        info = json.loads(file.metadata.get("info", "{}"))
        weights = {name[3:]: np.asarray(file[name]) for name in file if name.startswith("sd.")}
        if "model_config" in info and weights:
            config = config_from_official(info["model_config"])
            target = flatten(Network.abstract(DiT, config).params)
            yield path.stem, config, unflatten(convert(weights, TABLE, target)[0])


def hidden_states(config: DiTConfig, params, grid: int) -> dict[str, np.ndarray]:
    """Inputs and outputs of every layer for a block of random latents, and the velocity."""
    network = Network.abstract(DiT, config)
    dit = network.bind(jax.tree.map(jnp.asarray, params))
    keys = iter(jax.random.split(jax.random.key(0), 6))
    draw = lambda *shape: jax.random.normal(next(keys), shape)  # noqa: E731
    frames, c = config.frames_per_block, config.latent_channels
    reference = draw(1, 1, grid, grid, c)
    conditions = Conditions.of_portrait(
        config, reference, pose="zeros", text=draw(1, 8, config.text_width)
    )
    sink = dit.prefill(conditions)
    with record() as taps:
        velocity, _ = dit.stream_block(
            draw(1, frames, grid, grid, c),
            jnp.full((1, frames), 750.0),
            conditions.with_audio(draw(1, 1, 4 * frames, config.audio_layers, config.audio_width)),
            empty_cache(config, 1, grid, grid),
            sink,
            block_position(config, 0, 10),
        )
    seen = {name: np.asarray(value, np.float64) for name, value in taps.items()}
    states = [seen["block0_in"]]
    states += [seen[f"block{i}_after_audio"] for i in range(config.num_layers)]
    layers = {f"layer {i}": b - a for i, (a, b) in enumerate(itertools.pairwise(states))}
    return layers | {"velocity": np.asarray(velocity, np.float64)}


def report(config: DiTConfig, params, grid: int) -> dict[str, dict]:
    """Relative error and cosine of both kinds of weights against the stored ones."""
    exact = hidden_states(config, params, grid)
    result = {}
    for kind in ("int8", "fp8"):
        rounded = hidden_states(config.replace(weights=kind), quantise_params(params, kind), grid)
        result[kind] = {
            name: {
                "relative_error": round(float(np.linalg.norm(b - a) / np.linalg.norm(a)), 5),
                "cosine": round(float((a * b).sum() / np.linalg.norm(a) / np.linalg.norm(b)), 6),
            }
            for name, a, b in ((name, exact[name], rounded[name]) for name in exact)
        }
    return result


def main(argv=None) -> dict:
    arguments = parse_arguments(argv)
    if arguments.checkpoint:
        stored = StoredWeights(arguments.checkpoint)
        config = fill_fields(DiTConfig, stored.config, f"{arguments.checkpoint}: config")
        models = [(str(arguments.checkpoint.name), config, stored.restore())]
    else:
        models = golden_models(arguments.golden)
    with jax.default_matmul_precision("highest"):
        found = {name: report(config, params, arguments.grid) for name, config, params in models}
    return emit({"benchmark": "quantised", "models": found, **environment()}, arguments.out)


if __name__ == "__main__":
    cli.run(main)

"""Audio context that wav2vec 2.0 needs around a block of a live stream, and its cost.

    python benchmarks/audio_context.py --checkpoint FOLDER --audio speech.wav
    python benchmarks/audio_context.py --random full

For each look-back and look-ahead: the RMS error of the rolling window's features against those of
the whole recording read at the same times, relative to their deviation, for the first, middle and
last hidden state; and the time of one block. `timing` is the error of those same times against the
official ones, which stretch a recording by up to 47 ms towards its end. Random weights show the
structure only: their attention is nearly uniform, and neighbouring frames hardly alike.
"""

import itertools
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from benchmarks.common import (
    DEMO,
    emit,
    environment,
    measure,
    quantiles,
    random_weights,
    read_voice,
)
from jax_avatar.models.network import Network
from jax_avatar.models.speech.wav2vec2 import Wav2Vec2, Wav2Vec2Config, xlsr53_large
from jax_avatar.weights.files import load_weights
from launch import cli

__all__ = ["main", "open_encoder", "run"]

_BLOCK = 12  # video frames, three latents
_TAIL_S = 2.0  # not compared: where a recording ends, a live stream hears silence
_SIZES = {
    "tiny": Wav2Vec2Config(
        width=32, num_layers=4, num_heads=4, ffn_width=64, conv_widths=(16,) * 7
    ),
    "full": xlsr53_large(),
}


def open_encoder(checkpoint: str | None, random: str) -> tuple[Wav2Vec2Config, Any]:
    """Config and weights, from a model folder or random.

    Raises:
        ValueError: the folder's front end is another.
    """
    if checkpoint is None:
        config = _SIZES[random]
        return config, random_weights(lambda: Wav2Vec2(config, rngs=nnx.Rngs(0)))
    params, fields, _ = load_weights(checkpoint, "speech")
    if "conv_widths" not in fields:
        raise ValueError(f"speech in {checkpoint} is no wav2vec2; give a folder that has one.")
    return Wav2Vec2Config(**fields), jax.device_put(params)


def run(
    config: Wav2Vec2Config,
    params: Any,
    wave: np.ndarray,
    contexts: Sequence[tuple[float, float]],
    repeats: int,
) -> dict[str, Any]:
    """Errors and times per look-back and look-ahead, in seconds."""
    frames = len(wave) // config.samples_per_frame // _BLOCK * _BLOCK
    samples = jnp.asarray(wave)[None, None]
    # One block that is the whole recording: no context is missing.
    alone = config.replace(live="rolling", look_back_s=0.0, look_ahead_s=0.0)
    whole, _ = _stream(alone, params, samples, frames, frames, 0)
    official = np.asarray(_jit(config, "encode", static_argnums=2)(params, samples, frames))
    compared = frames - round(_TAIL_S * config.fps)
    if compared < _BLOCK:
        raise ValueError(
            f"{frames / config.fps:g} s of audio; at least {_TAIL_S + 0.5:g} s needed."
        )
    results = []
    for back, ahead in contexts:
        live = alone.replace(look_back_s=back, look_ahead_s=ahead)
        features, seconds = _stream(live, params, samples, frames, _BLOCK, repeats)
        results.append(
            {"look_back_s": back, "look_ahead_s": ahead}
            | _errors(features[:, :, :compared], whole[:, :, :compared])
            | {"block": quantiles(seconds)}
        )
    return {
        "timing": _errors(whole[:, :, :compared], official[:, :, :compared]),
        "results": results,
    }


def _errors(features: np.ndarray, reference: np.ndarray) -> dict[str, float]:
    error = np.sqrt(np.mean((features - reference) ** 2, (0, 1, 2, 4)))
    relative = error / reference.std((0, 1, 2, 4))
    states = {"first": 0, "middle": len(relative) // 2, "last": -1}
    return {f"error_{name}": round(float(relative[k]), 4) for name, k in states.items()}


def _jit(config: Wav2Vec2Config, method: str, **options: Any):
    network = Network.abstract(Wav2Vec2, config)
    return jax.jit(lambda p, *args: getattr(network.bind(p), method)(*args), **options)


def _stream(
    config: Wav2Vec2Config, params: Any, samples: jax.Array, frames: int, block: int, repeats: int
) -> tuple[np.ndarray, list[float]]:
    step = _jit(config, "features")
    head, stop = config.sample_range(0, frames)
    samples = jnp.pad(samples, ((0, 0), (0, 0), (0, max(0, stop - samples.shape[-1]))))
    state, parts = _jit(config, "start")(params, samples[..., :head]), []
    for first in range(0, frames, block):
        start, stop = config.sample_range(first, block)
        features, state = step(params, state, samples[..., start:stop])
        parts.append(np.asarray(features))
    chunk = samples[..., start:stop]
    return np.concatenate(parts, axis=2), measure(lambda: step(params, state, chunk), repeats)


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Command line."""
    parser = cli.Parser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--checkpoint", help="model folder with a wav2vec2; random weights if not")
    parser.add_argument("--random", choices=list(_SIZES), default="tiny", help="size if random")
    parser.add_argument("--audio", default=str(DEMO), help="speech, any format")
    parser.add_argument("--seconds", type=float, default=14.4, help="of it that are used")
    parser.add_argument("--look-back", type=float, nargs="+", default=[0.0, 1.28, 4.0, 8.0])
    parser.add_argument("--look-ahead", type=float, nargs="+", default=[0.0, 0.24, 0.48, 1.28])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", help="JSON file to write besides")
    options = parser.parse_args(arguments)
    config, params = open_encoder(options.checkpoint, options.random)
    wave = read_voice(options.audio, config.sample_rate)
    wave = wave[: round(options.seconds * config.sample_rate)]
    contexts = list(itertools.product(options.look_back, options.look_ahead))
    weights = options.checkpoint or f"random, {options.random}"
    record = {
        "benchmark": "audio_context",
        "weights": weights,
        "audio_s": len(wave) / config.sample_rate,
    }
    found = run(config, params, wave, contexts, options.repeats)
    return emit(record | found | environment(), options.out)


if __name__ == "__main__":
    cli.run(main)

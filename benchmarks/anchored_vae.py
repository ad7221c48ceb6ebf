"""Scores of the anchored VAE on people that nothing was trained on, against the rendered truth.

    python benchmarks/anchored_vae.py --weights runs/anchored_vae --data data/moved_test
    python benchmarks/anchored_vae.py --weights runs/anchored_vae --sheet sheet.png --people 12

    python benchmarks/anchored_vae.py --weights MODEL --model MODEL --seeds 4

Rows: `motion` decodes the latents of the true motion, as a perfect generator would give them;
`encoded` those that the encoder reads from the true frames; `light` is the VAE of the model that
ships, which reads them at its own 96 pixels; `streamed` is what a model makes of the portrait and
the sound, means over seeds; `still` shows the portrait; `truth` gives the ceilings of the probes.
One JSON line a row, means with bootstrap intervals over clips.
"""

import argparse
import functools
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from benchmarks.common import emit, environment
from jax_avatar.data.talking_people.moved_portraits import (
    WINDOW,
    MovedPortrait,
    MovedPortraitsConfig,
    load_moved_portrait,
)
from jax_avatar.evaluation.moved_portrait_scores import (
    blinks,
    clip_scores,
    fit_probes,
    means,
    resized,
)
from jax_avatar.models.network import Network
from jax_avatar.models.vae.anchored import AnchoredVAE, AnchoredVAEConfig
from jax_avatar.models.vae.light import LightVAE, LightVAEConfig
from jax_avatar.pixels import from_uint8, to_uint8
from jax_avatar.streaming.batch import BatchStream
from jax_avatar.training.stages.anchored_vae import HELD_OUT_SEED
from jax_avatar.weights.files import load_weights
from jax_avatar.weights.folder import load_model
from launch import cli

_LIGHT_SIDE = 96
_TEXTURE = {128: 512, 256: 768, 512: 1024}
Decode = Callable[[MovedPortrait], np.ndarray]


def parse_arguments(argv=None) -> argparse.Namespace:
    parser = cli.Parser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--weights", required=True, help="folder with the anchored VAE")
    add("--light", default="jax_avatar/assets/small", help='folder with the light VAE; "" for none')
    add("--model", default="", help="folder of a model to stream; none if empty")
    add("--seeds", type=int, default=4, help="streams of every clip")
    add("--data", default="data/moved_test", help="folder for the rendered clips, made once")
    add("--movement", type=float, nargs="+", default=[0.3, 0.6, 1.0], help="of the head")
    add("--people", type=int, default=24, help="held-out people, a clip of each")
    add("--frames", type=int, default=48, help="of a clip")
    add("--size", type=int, default=256, choices=_TEXTURE, help="pixels")
    add("--probe_people", type=int, default=96, help="training people whose frames fit the probes")
    add("--probe_steps", type=int, default=1000, help="of fitting the probes")
    add("--sheet", default=None, help="contact sheet to write, one for each movement")
    add("--out", default=None, help="JSON file to write")
    return parser.parse_args(argv)


def load(folder: str, network: type, config: type) -> Network:
    """A VAE with its weights on the device."""
    params, fields, _ = load_weights(folder, "vae")
    made = Network.abstract(network, config(**fields))
    return made.with_params(jax.device_put(params))


def anchored(network: Network) -> tuple[Decode, Decode]:
    """Decoding of the true motion, and of what the encoder reads; one latent at a time."""
    config = network.config

    @jax.jit
    def prepare(params, portrait):
        return network.bind(params).prepare(portrait)

    @jax.jit
    def decode(params, ready, latent):
        return network.bind(params).decode_next(ready, latent)[0]

    @jax.jit
    def code(params, windows):
        latent = network.bind(params).basis.to_latent(windows)
        return latent.reshape(1, -1, *config.latent_shape)

    @jax.jit
    def encode(params, video):
        return network.bind(params).encode(video)

    def shown(clip: MovedPortrait, latents: jax.Array) -> np.ndarray:
        ready = prepare(network.params, from_uint8(clip.portrait[None]))
        parts = [decode(network.params, ready, z[None, None]) for z in latents[0]]
        return np.concatenate([to_uint8(np.asarray(part[0])) for part in parts])

    def motion(clip: MovedPortrait) -> np.ndarray:
        return shown(clip, code(network.params, jnp.asarray(clip.motion[::WINDOW])))

    def encoded(clip: MovedPortrait) -> np.ndarray:
        small = resized(np.concatenate([clip.portrait[None], clip.frames]), 128)
        return shown(clip, encode(network.params, from_uint8(small[None]))[:, 1:])

    return motion, encoded


def light(network: Network) -> Decode:
    """Round trip of the light VAE; the portrait is its first frame."""
    run = jax.jit(
        lambda params, x: (vae := network.bind(params)).decode(vae.encode(x)),
    )

    def through(clip: MovedPortrait) -> np.ndarray:
        small = resized(np.concatenate([clip.portrait[None], clip.frames]), _LIGHT_SIDE)
        return resized(
            to_uint8(np.asarray(run(network.params, from_uint8(small[None]))[0, 1:])),
            clip.frames.shape[1],
        )

    return through


def streamed(folder: str, seeds: int) -> Decode:
    """Streams of the portrait and the sound, one for each seed."""
    stream = BatchStream(load_model(folder))

    def make(clip: MovedPortrait) -> np.ndarray:
        portraits, waves = (np.repeat(x[None], seeds, 0) for x in (clip.portrait, clip.wave))
        return stream(portraits, waves, 1 + len(clip.frames))[:, 1:]

    return make


def mean_scores(made: np.ndarray, clip: MovedPortrait, probes: tuple) -> dict[str, float]:
    """Scores of one clip, means over its seeds."""
    rows = [clip_scores(frames, clip, *probes) for frames in made]
    return {name: float(np.mean([row[name] for row in rows])) for name in rows[0]}


def held_out(arguments: argparse.Namespace, movement: float) -> Iterator[MovedPortrait]:
    config = MovedPortraitsConfig(
        size=arguments.size,
        count=arguments.frames,
        movement=(movement, movement),
        is_plain=True,
        texture_size=_TEXTURE[arguments.size],
    )
    folder = Path(arguments.data) / f"{arguments.size}_{arguments.frames}_{movement:g}"
    for seed in range(HELD_OUT_SEED, HELD_OUT_SEED + arguments.people):
        yield load_moved_portrait(folder, seed, config)


def sheet_row(clip: MovedPortrait, rows: dict[str, np.ndarray]) -> np.ndarray:
    """The portrait; then truth and results at the widest mouth, closed lids, the largest turn."""
    change = np.abs(clip.frames.astype(np.float32) - clip.portrait).mean((1, 2, 3))
    picks = (clip.lip_gap.argmax(), blinks(clip).argmax(), change.argmax())
    return np.concatenate([clip.portrait, *(rows[name][i] for i in picks for name in rows)], 1)


def main(argv=None) -> int:
    arguments = parse_arguments(argv)
    motion, encoded = anchored(load(arguments.weights, AnchoredVAE, AnchoredVAEConfig))
    decoders = dict(motion=motion, encoded=encoded)
    if arguments.light:
        decoders["light"] = light(load(arguments.light, LightVAE, LightVAEConfig))
    decoders["still"] = lambda clip: np.repeat(clip.portrait[None], len(clip.frames), 0)
    decoders["truth"] = lambda clip: clip.frames
    decoders = {name: lambda clip, d=decode: d(clip)[None] for name, decode in decoders.items()}
    if arguments.model:
        decoders["streamed"] = streamed(arguments.model, arguments.seeds)
    train = functools.partial(load_moved_portrait, Path(arguments.data) / "probe")
    probes = fit_probes(
        [train(seed, MovedPortraitsConfig()) for seed in range(arguments.probe_people)],
        num_steps=arguments.probe_steps,
    )
    record = environment() | {"benchmark": "anchored_vae", "rows": []}
    for movement in arguments.movement:
        scores: dict[str, list] = {name: [] for name in decoders}
        lines = []
        for clip in held_out(arguments, movement):
            shown = {name: decode(clip) for name, decode in decoders.items()}
            for name, frames in shown.items():
                scores[name].append(mean_scores(frames, clip, probes))
            second = "streamed" if arguments.model else "encoded"
            kept = {n: shown[n][0] for n in ("truth", "motion", second)}
            lines.append(sheet_row(clip, kept))
        for name, rows in scores.items():
            row = {"of": name, "movement": movement, "clips": len(rows)}
            row |= {k: [round(v, 3) for v in values] for k, values in means(rows).items()}
            record["rows"].append(row)
            print(row, flush=True)
        if arguments.sheet:
            path = Path(arguments.sheet)
            Image.fromarray(np.concatenate(lines)).save(path.with_stem(f"{path.stem}_{movement:g}"))
    emit(record, arguments.out)
    return 0


if __name__ == "__main__":
    cli.run(main)

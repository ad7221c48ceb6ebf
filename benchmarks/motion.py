"""Scores of generated motion on speech that nothing was trained on: does the chain earn its place?

    python benchmarks/motion.py --latents data/motion --model jax_avatar/assets/anchored \\
        --teacher runs/teacher --stage1 runs/diffusion_forcing --student runs/dmd

Rows: `truth` (of other clips: the floor of distances), `still`, `untrained`, `regression` (the
mouth as the speech encoder's own head reads it, all else of other clips), the teacher with
guidance, stage 1 in 1, 4 and 40 steps, the student in 4, 2 and 1, each with the steps' own
histories and with a clean one. Prints a table and writes JSON.
"""

import argparse
import dataclasses
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from benchmarks.common import emit, environment
from jax_avatar.data.latents import LatentClips, load_encoded
from jax_avatar.evaluation.motion_scores import curves_of, groups_of, motion_rows, motion_scores
from jax_avatar.models.conditions import Conditions
from jax_avatar.models.network import Network
from jax_avatar.streaming.plan import StreamPlan
from jax_avatar.streaming.sampler import SequentialStream
from jax_avatar.training.teacher import SamplerConfig, make_sampler
from jax_avatar.weights.folder import load_settings
from jax_avatar.weights.networks import load_network
from jax_avatar.weights.settings import read_config
from launch import cli

Make = Callable[[], np.ndarray]


def parse_arguments(argv=None) -> argparse.Namespace:
    parser = cli.Parser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--latents", required=True, help="encoded set of motion")
    add("--model", required=True, help="folder with the VAE and the speech encoder")
    add("--split", default="held_out_voice", help="of the set")
    add("--teacher", default="", help="folder of stage 0; left out if empty")
    add("--stage1", default="", help="folder of stage 1; left out if empty")
    add("--student", default="", help="folder of stage 2; left out if empty")
    add("--clips", type=int, default=24, help="held-out clips")
    add("--seconds", type=float, default=11.52, help="of each")
    add("--seeds", type=int, default=4, help="of each")
    add("--guidance", type=float, nargs="+", default=[1.0, 2.0], help="scales of the teacher")
    add("--steps", type=int, nargs="+", default=[1, 4, 40], help="of stage 1")
    add("--shift", type=float, default=3.0, help="of the levels of stage 1")
    add("--out", default=None, help="JSON file to write")
    return parser.parse_args(argv)


class Clips:
    """Held-out clips, and the VAE that says what their latents mean."""

    def __init__(self, arguments: argparse.Namespace):
        self.vae = load_network(arguments.model, "vae").bind()
        self.speech = load_network(arguments.model, "speech").bind()
        encode = jax.jit(self.speech.encode, static_argnums=1)

        def features(wave, frames):
            return np.asarray(encode(wave[None, None].astype(np.float32) / 32768, frames))[0, 0]

        heard = self.speech.config
        stored = load_encoded(
            *(arguments.latents, arguments.split),
            encode_speech=features,
            states=(heard.num_states, heard.width),
        )
        self.fps, self.seeds = stored.fps, arguments.seeds
        latents = round(arguments.seconds * stored.fps / 12) * 3
        long_enough = np.flatnonzero(stored.lengths >= latents)
        if len(long_enough) < 2 * arguments.clips:
            raise ValueError(
                f"{arguments.latents} has {len(long_enough)} clips of {arguments.seconds} s in "
                f"split {arguments.split}; give --clips {len(long_enough) // 2} or less, or "
                "shorter ones by --seconds."
            )
        chosen = long_enough[: 2 * arguments.clips]
        clips: LatentClips = stored.take(chosen[: arguments.clips])
        others: LatentClips = stored.take(chosen[arguments.clips :])
        self.latent = clips.latent[:, :latents].astype(np.float32)
        self.features = clips.features[:, None, : 4 * latents].astype(np.float32)
        self.reference = clips.reference.astype(np.float32)
        self.truth = curves_of(self.vae, self.latent)
        self.others = curves_of(self.vae, others.latent[:, :latents].astype(np.float32))

    def scores(self, made: np.ndarray) -> dict:
        """Of curves of all seeds."""
        return motion_scores(made, self.truth, self.vae.config, self.fps)

    def told(self) -> tuple[jax.Array, jax.Array]:
        """Reference and features once for every seed."""
        return tuple(
            jnp.asarray(np.tile(x, (self.seeds, *(1,) * (x.ndim - 1))))
            for x in (self.reference, self.features)
        )

    def curves(self, latents: np.ndarray) -> np.ndarray:
        """Of all seeds, `s b T c`."""
        curves = curves_of(self.vae, np.asarray(latents))
        return curves.reshape(self.seeds, -1, *curves.shape[1:])


def regression(clips: Clips) -> np.ndarray:
    """The mouth as the speech encoder reads it; everything else of other clips."""
    config, made = clips.vae.config, []
    read = np.asarray(clips.speech.units(jnp.asarray(clips.features)))[:, 0]
    for seed in range(clips.seeds):
        curves = np.roll(clips.others, seed, axis=0).copy()
        curves[..., groups_of(config)["mouth"]] = 0
        for i, unit in enumerate(clips.speech.config.units):
            for side in {unit, unit.replace("Left", "Right")}:
                at = config.curves.index(side)
                curves[..., at] = read[..., i] / config.scale[at]
        made.append(curves)
    return np.stack(made)


def streamed(clips: Clips, dit: Network, plan: StreamPlan) -> np.ndarray:
    """Latents as a stream makes them, all clips and seeds side by side."""
    reference, features = clips.told()
    conditions = Conditions.of_portrait(dit.config, reference, pose="zeros")
    stream = SequentialStream(dit, plan, conditions, device=jax.devices()[0])
    size, parts = 4 * dit.config.frames_per_block, []
    for start in range(0, features.shape[2], size):
        parts += stream.push(features[:, :, start : start + size])
    parts += stream.finish()
    return clips.curves(np.concatenate([np.asarray(part) for part in parts], axis=1))


def sampled(clips: Clips, dit: Network, guidance: float) -> np.ndarray:
    """Latents as the teacher makes them, whole clips."""
    sample = make_sampler(dit, SamplerConfig(40, guidance=guidance), pose="zeros")
    return clips.curves(np.asarray(sample(dit.params, *clips.told())))


def untrained(folder: str) -> Network:
    """A network of random weights in the size of a folder's; its head is not zero."""
    known = load_network(folder, "dit")
    module = known.module_class(known.config, rngs=nnx.Rngs(params=0))
    return Network.of(module)


def makers(arguments: argparse.Namespace, clips: Clips) -> Iterator[tuple[str, Make]]:
    yield "truth", lambda: np.stack([np.roll(clips.others, s, 0) for s in range(clips.seeds)])
    yield "still", lambda: np.stack([0 * clips.truth] * clips.seeds)
    yield "regression", lambda: regression(clips)
    if arguments.teacher:
        dit = load_network(arguments.teacher, "dit", _kind(arguments.teacher))
        for scale in arguments.guidance:
            yield f"teacher, guidance {scale:g}", lambda s=scale: sampled(clips, dit, s)
    for name in ("stage1", "student"):
        folder = getattr(arguments, name)
        if not folder:
            continue
        dit = load_network(folder, "dit", _kind(folder))
        plan = StreamPlan.from_settings(load_settings(folder), 420)
        if name == "stage1":
            levels = {n: f"shift{arguments.shift:g}:{n}" for n in arguments.steps}
            yield "untrained", lambda f=folder, p=plan: streamed(clips, untrained(f), p)
        else:
            kept = plan.sigmas
            levels = {len(kept) - 1: kept, 2: (*kept[:3:2], 0.0), 1: (1.0, 0.0)}
        for steps, sigmas in levels.items():
            few = dataclasses.replace(plan, sigmas=sigmas)
            yield f"{name}, {steps} steps", lambda d=dit, p=few: streamed(clips, d, p)
            if steps > 1:
                clean = dataclasses.replace(few, refresh="clean")
                yield (
                    f"{name}, {steps} steps, clean history",
                    lambda d=dit, p=clean: streamed(clips, d, p),
                )


def _kind(folder: str) -> str:
    return read_config(folder, ("dit",))["dit"]


def main(argv=None) -> None:
    arguments = parse_arguments(argv)
    clips = Clips(arguments)
    rows, about = {}, {"n": len(clips.truth), "seeds": clips.seeds, "split": arguments.split}
    for name, make in makers(arguments, clips):
        rows[name] = clips.scores(make())
        print(motion_rows({name: rows[name]})[-1], flush=True)
    print("\n".join(motion_rows(rows)))
    emit({"environment": environment(), **about, "rows": rows}, arguments.out)


if __name__ == "__main__":
    cli.run(main)

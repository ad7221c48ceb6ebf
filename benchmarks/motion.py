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

import jax.numpy as jnp
import numpy as np
from flax import nnx

from benchmarks.common import emit, environment
from jax_avatar.data.latents import load_encoded
from jax_avatar.diffusion.schedule import few_step_schedule
from jax_avatar.evaluation.motion_kit import MotionClips
from jax_avatar.evaluation.motion_scores import groups_of, motion_rows
from jax_avatar.models.network import Network
from jax_avatar.models.speech.mel import SpeechEncoder
from jax_avatar.streaming.batch import BatchStream
from jax_avatar.streaming.plan import StreamPlan
from jax_avatar.training.teacher import SamplerConfig, make_sampler
from jax_avatar.weights.encoders import Encoders
from jax_avatar.weights.folder import AvatarModel, load_model
from jax_avatar.weights.networks import load_network
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


def held_out(arguments: argparse.Namespace) -> tuple[MotionClips, SpeechEncoder]:
    """The clips, and the speech encoder that heard them."""
    vae, speech = (load_network(arguments.model, part).bind() for part in ("vae", "speech"))
    encoders = Encoders.load(dict.fromkeys(("vae", "speech"), arguments.model))
    stored = load_encoded(
        *(arguments.latents, arguments.split),
        encode_speech=encoders.features,
        states=encoders.states,
    )
    clips = MotionClips(
        *(stored, vae), count=arguments.clips, seconds=arguments.seconds, seeds=arguments.seeds
    )
    return clips, speech


def regression(clips: MotionClips, speech: SpeechEncoder) -> np.ndarray:
    """The mouth as the speech encoder reads it; everything else of other clips."""
    config, made = clips.vae.config, []
    read = np.asarray(speech.units(jnp.asarray(clips.features[: len(clips)])))[:, 0]
    for seed in range(clips.seeds):
        curves = np.roll(clips.others, seed, axis=0).copy()
        curves[..., groups_of(config)["mouth"]] = 0
        for i, unit in enumerate(speech.config.units):
            for side in {unit, unit.replace("Left", "Right")}:
                at = config.curves.index(side)
                curves[..., at] = read[..., i] / config.scale[at]
        made.append(curves)
    return np.stack(made)


def untrained(model: AvatarModel) -> AvatarModel:
    """The same model with a transformer of random weights."""
    dit = model.dit
    network = Network.of(dit.module_class(dit.config, rngs=nnx.Rngs(params=0)))
    return dataclasses.replace(model, dit=network)


def makers(
    arguments: argparse.Namespace, clips: MotionClips, speech: SpeechEncoder
) -> Iterator[tuple[str, Make]]:
    """Rows by name."""
    yield "truth", lambda: np.stack([np.roll(clips.others, s, 0) for s in range(clips.seeds)])
    yield "still", lambda: np.stack([0 * clips.truth] * clips.seeds)
    yield "regression", lambda: regression(clips, speech)
    if arguments.teacher:
        model = load_model(arguments.teacher)
        for scale in arguments.guidance:
            sample = make_sampler(model.dit, SamplerConfig(40, guidance=scale), pose="zeros")
            stream = BatchStream(model, sample=sample)
            yield f"teacher, guidance {scale:g}", lambda s=stream: clips.make(s)
    for name in ("stage1", "student"):
        if folder := getattr(arguments, name):
            model = load_model(folder)
            plan = StreamPlan.from_settings(model.settings, 420)
            if name == "stage1":
                yield "untrained", lambda m=model, p=plan: clips.make(BatchStream(untrained(m), p))
                levels = {n: few_step_schedule(n, arguments.shift).sigmas for n in arguments.steps}
            else:
                kept = plan.sigmas
                levels = {len(kept) - 1: kept, 2: (*kept[:3:2], 0.0), 1: (1.0, 0.0)}
            yield from rows_of(name, model, plan, levels, clips)


def rows_of(
    name: str, model: AvatarModel, plan: StreamPlan, levels: dict, clips: MotionClips
) -> Iterator[tuple[str, Make]]:
    """A network in several numbers of steps, with the steps' own histories and a clean one."""
    for steps, sigmas in levels.items():
        for refresh in ("none", "clean")[: 1 + (steps > 1)]:
            changed = dataclasses.replace(plan, sigmas=sigmas, refresh=refresh)
            row = f"{name}, {steps} steps" + ", clean history" * (refresh == "clean")
            yield row, lambda p=changed: clips.make(BatchStream(model, p))


def main(argv=None) -> None:
    arguments = parse_arguments(argv)
    clips, speech = held_out(arguments)
    rows, about = {}, {"n": len(clips), "seeds": clips.seeds, "split": arguments.split}
    for name, make in makers(arguments, clips, speech):
        rows[name] = clips.scores(make())
        print(motion_rows({name: rows[name]})[-1], flush=True)
    print("\n".join(motion_rows(rows)))
    emit({"environment": environment(), **about, "rows": rows}, arguments.out)


if __name__ == "__main__":
    cli.run(main)

"""Scores a model folder on people and voices it has never met.

    python launch/evaluate.py --checkpoint jax_avatar/assets/small --data data/people --out eval

Streams every held-out clip from its portrait and its wave, compares lips, identity and motion with
the renderer's truth, streams a minute to look for drift, and writes `scores.json`, with 95 %
bootstrap intervals over the clips, contact sheets and videos. `--baselines` scores what any model
must be better than: the portrait standing still, and the same model in one step.

    python launch/evaluate.py --data data/test --baselines --scores scores.json

A teacher makes whole clips instead of streaming them, and no minute:

    python launch/evaluate.py --checkpoint runs/teacher --sampler teacher --steps 40 --guidance 4

The minute without what keeps long streams steady:

    python launch/evaluate.py --splits=held_out_both --noaas --norolling_rope
"""

import dataclasses
import json
import shlex
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
from absl import flags
from PIL import Image
from tqdm import tqdm

from jax_avatar.data.records import read_clips
from jax_avatar.evaluation.scores import (
    Truth,
    contact_sheet,
    fit_probe,
    measure,
    reconstruct,
    score_stream,
    still_portraits,
)
from jax_avatar.evaluation.tables import rows_of, scored
from jax_avatar.io.video import VideoWriter
from jax_avatar.models.params import merge
from jax_avatar.streaming.batch import BatchStream
from jax_avatar.streaming.plan import StreamPlan
from jax_avatar.training.teacher import SamplerConfig, make_sampler
from jax_avatar.weights.files import save_json
from jax_avatar.weights.folder import SMALL, load_model
from launch import cli

flags.DEFINE_string("checkpoint", str(SMALL), cli.CHECKPOINT)
flags.DEFINE_string("data", "data/people", "folder written by launch/prepare_data.py people")
flags.DEFINE_string("out", "eval", "folder to write to")
flags.DEFINE_string("scores", "", "file for the scores; OUT/scores.json if not given")
flags.DEFINE_list("splits", ["held_out_person", "held_out_voice", "held_out_both"], "to score")
flags.DEFINE_integer("clips", 24, "clips per split", lower_bound=2)
flags.DEFINE_integer("batch", 8, "portraits streamed side by side", lower_bound=1)
flags.DEFINE_integer("long_s", 60, "seconds of the long stream; 0 for none", lower_bound=0)
flags.DEFINE_enum("sampler", "stream", ["stream", "teacher"], "how clips are made")
flags.DEFINE_integer("steps", 40, "denoising steps of the teacher", lower_bound=1)
flags.DEFINE_float("guidance", 4.0, "guidance scale of the teacher; 1 is none")
flags.DEFINE_bool("aas", True, "renew the sink with a generated latent, as the model says")
flags.DEFINE_bool("rolling_rope", True, "let the sink move along with the stream")
flags.DEFINE_bool("baselines", False, "also score the still portrait and one step, (1, 0)")
flags.DEFINE_integer("seed", 420, "of the noise and the bootstrap's draws", lower_bound=0)
FLAGS = flags.FLAGS


def sampler(model):
    if FLAGS.sampler == "stream":
        return None
    settings = SamplerConfig(FLAGS.steps, guidance=FLAGS.guidance, seed=FLAGS.seed)
    dit = model.dit
    return make_sampler(dit.graphdef, dit.config, settings, pose=model.settings.pose)


def stream_plan(model):
    plan = StreamPlan.from_settings(model.settings, FLAGS.seed)
    if not FLAGS.aas:
        plan = dataclasses.replace(plan, aas_after_blocks=0)
    if not FLAGS.rolling_rope:  # so far behind that the sink stays where it is in the beginning
        size = model.dit.config.frames_per_block
        plan = dataclasses.replace(plan, distance=lambda block, step: -size * block)
    return plan


def stream_split(stream, clips):
    frames = len(clips[0].frames)
    parts = []
    for start in tqdm(range(0, len(clips), FLAGS.batch)):
        part = [clips[i % len(clips)] for i in range(start, start + FLAGS.batch)]
        waves = np.stack([clip.wave for clip in part]).astype(np.float32) / 32768
        parts.append(stream(np.stack([clip.portrait for clip in part]), waves, frames))
    return np.concatenate(parts)[: len(clips)]


def stream_long(stream, clips, seconds):
    """A few people who say everything after one another, over and over."""
    count = FLAGS.batch
    said = np.concatenate([clip.wave for clip in clips]).astype(np.float32) / 32768
    fps, samples = stream.model.settings.fps, seconds * stream.model.speech.config.sample_rate
    waves = np.stack(
        [np.resize(np.roll(said, -i * len(said) // count), samples) for i in range(count)]
    )
    portraits = np.stack([clips[i % len(clips)].portrait for i in range(count)])
    frames = stream(portraits, waves, seconds * fps)
    return score_stream(frames, portraits, window=5 * fps, seed=FLAGS.seed), frames, waves


def make_folder(out):
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"--out {out} cannot be written ({error.strerror}).") from error


def streams_of(model):
    """Makers of clips, by the name of their row."""
    plan = stream_plan(model)
    streams = {"generated": BatchStream(model, plan, sample=sampler(model))}
    if FLAGS.baselines and FLAGS.sampler == "stream":
        once = dataclasses.replace(plan, sigmas=(1.0, 0.0))
        streams["one_step"] = BatchStream(model, once)
    return streams


def score_split(model, streams, split, probe, out):
    """Scores of all rows on a split, written as pictures, too; and the clips."""
    source = read_clips(FLAGS.data, split)
    clips = [source[i] for i in range(min(FLAGS.clips, len(source)))]
    truth = Truth.from_clips(clips)
    made = {name: stream_split(stream, clips) for name, stream in streams.items()}
    if FLAGS.baselines:
        made["still"] = still_portraits(truth)
    vae = merge(model.vae.graphdef, model.vae.params)
    made["decoded_truth"] = reconstruct(vae, truth.frames)
    rows = {
        name: scored(measure(frames, truth, probe), seed=FLAGS.seed)
        for name, frames in made.items()
    }
    frames = made["generated"]
    Image.fromarray(contact_sheet(frames, truth)).save(out / f"{split}.png")
    for i in range(min(3, len(clips))):
        pair = np.concatenate([truth.frames[i], frames[i]], axis=2)
        write(out / f"{split}_{i}.mp4", pair, clips[i].wave / 32768, model)
    print(f"\n{split}, n {len(clips)}, seed {FLAGS.seed}", *rows_of(rows), sep="\n", flush=True)
    return {"n": len(clips), **rows}, clips


def evaluate(out):
    """Scores everything, and saves with it how it was asked for."""
    model = load_model(FLAGS.checkpoint)
    streams = streams_of(model)
    train = read_clips(FLAGS.data, "train")
    probe = fit_probe([train[i] for i in range(0, len(train), max(1, len(train) // 200))])
    told = ("checkpoint", "clips", "seed", "sampler", "aas", "rolling_rope")
    told += ("steps", "guidance") if FLAGS.sampler == "teacher" else ()
    scores = {"command": shlex.join(["python", "launch/evaluate.py", *sys.argv[1:]])}
    scores |= {name: FLAGS[name].value for name in told}
    root, folder = Path(__file__).parents[1].resolve(), Path(FLAGS.checkpoint).resolve()
    if folder.is_relative_to(root):  # so that a kept file names no folder of a machine
        scores["checkpoint"] = str(folder.relative_to(root))
    for split in FLAGS.splits:
        scores[split], clips = score_split(model, streams, split, probe, out)
        save(out, scores)
    if FLAGS.long_s and FLAGS.sampler == "stream":
        found, frames, waves = stream_long(streams["generated"], clips, FLAGS.long_s)
        scores["long"] = {"n": FLAGS.batch, "seconds": FLAGS.long_s, **found}
        if "one_step" in streams:
            scores["long"]["one_step"] = stream_long(streams["one_step"], clips, FLAGS.long_s)[0]
        write(out / "long.mp4", frames[0], waves[0], model)
        save(out, scores)
        print("long", json.dumps(scores["long"]), flush=True)


def save(out, scores):
    """After every part, so that a command that is stopped has not lost the others."""
    save_json(FLAGS.scores or out / "scores.json", scores)


def run() -> None:
    out = Path(FLAGS.out)
    cli.check_finite(FLAGS)
    inputs = {"checkpoint": FLAGS.checkpoint, "data": FLAGS.data}
    cli.refuse_input_as_output("out", out, **inputs)
    if FLAGS.scores:
        cli.refuse_input_as_output("scores", FLAGS.scores, **inputs)
        make_folder(Path(FLAGS.scores).parent)
    cli.check_devices()
    make_folder(out)
    evaluate(out)


def write(path, frames, wave, model):
    rate = model.speech.config.sample_rate
    height, width = frames.shape[1:3]
    with VideoWriter(path, width, height, model.settings.fps, rate) as video:
        video.write_audio(np.asarray(wave, np.float32))
        video.write_frames(frames.astype(np.uint8))


if __name__ == "__main__":
    cli.run_with_flags(run, hint="the scores of finished splits are saved")

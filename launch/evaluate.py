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

import json
import shlex
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from absl import flags
from tqdm import tqdm

from jax_avatar.evaluation.kit import KitSettings, ablated_plan, evaluate, makers_of
from jax_avatar.evaluation.tables import rows_of
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
    """Sampler of whole clips; None if the model streams."""
    if FLAGS.sampler == "stream":
        return None
    settings = SamplerConfig(FLAGS.steps, guidance=FLAGS.guidance, seed=FLAGS.seed)
    return make_sampler(model.dit, settings, pose=model.settings.pose)


def asked() -> dict:
    """Flags and command, to be kept with the scores."""
    names = ["checkpoint", "clips", "seed", "sampler", "aas", "rolling_rope"]
    names += ["steps", "guidance"] if FLAGS.sampler == "teacher" else []
    told = {"command": shlex.join(["python", "launch/evaluate.py", *sys.argv[1:]])}
    told |= {name: FLAGS[name].value for name in names}
    root, folder = Path(__file__).parents[1].resolve(), Path(FLAGS.checkpoint).resolve()
    if folder.is_relative_to(root):  # so that a kept file names no folder of a machine
        told["checkpoint"] = str(folder.relative_to(root))
    return told


def make_folder(out: Path) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"--out {out} cannot be written ({error.strerror}).") from error


def run() -> None:
    out, is_stream = Path(FLAGS.out), FLAGS.sampler == "stream"
    cli.check_finite(FLAGS)
    inputs = {"checkpoint": FLAGS.checkpoint, "data": FLAGS.data}
    cli.refuse_input_as_output("out", out, **inputs)
    if FLAGS.scores:
        cli.refuse_input_as_output("scores", FLAGS.scores, **inputs)
        make_folder(Path(FLAGS.scores).parent)
    cli.check_devices()
    make_folder(out)
    model = load_model(FLAGS.checkpoint)
    plan = ablated_plan(model, FLAGS.seed, aas=FLAGS.aas, rolling_rope=FLAGS.rolling_rope)
    one_step = FLAGS.baselines and is_stream
    makers = makers_of(model, plan, sample=sampler(model), one_step=one_step)
    long_s = FLAGS.long_s if is_stream else 0
    settings = KitSettings(FLAGS.clips, FLAGS.batch, long_s, FLAGS.seed, FLAGS.baselines)
    scores = asked()
    for name, found in evaluate(
        model, FLAGS.data, FLAGS.splits, makers, settings, out, progress=tqdm
    ):
        scores[name] = found
        # After every part, so that a command that is stopped has not lost the others.
        save_json(FLAGS.scores or out / "scores.json", scores)
        if name == "long":
            print("long", json.dumps(found), flush=True)
            continue
        rows = {row: values for row, values in found.items() if row != "n"}
        print(f"\n{name}, n {found['n']}, seed {FLAGS.seed}", *rows_of(rows), sep="\n", flush=True)


if __name__ == "__main__":
    cli.run_with_flags(run, hint="the scores of finished splits are saved")

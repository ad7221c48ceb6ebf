"""Device requirements of a stream, without weights or devices.

python launch/plan.py --model wan_s2v_14b --mesh 5 --hardware h200
python launch/plan.py --model wan_s2v_14b --mesh 4x2+1 --hardware v6e --json
python launch/plan.py --task dmd --mesh 8x1 --hardware h100     training: data x model devices
python launch/plan.py --task dmd --mesh 16x8x1 --hardware h100  replica x data x model

The real step is compiled on shapes alone: for TPUs by the TPU compiler, which needs no TPU
(pip install -e ".[plan]"; minutes), for all others by the compiler for CPUs (seconds).
"""

import importlib.util
import json
import os
import sys
from pathlib import Path

# Shapes only: whatever accelerator is here is left alone.
os.environ["JAX_PLATFORMS"] = "cpu"
sys.path.insert(0, str(Path(__file__).parents[1]))

import jax
from absl import flags

from jax_avatar.io.image import fit_size
from jax_avatar.layout import parse_training_layout
from jax_avatar.planning.hardware import find_hardware
from jax_avatar.planning.programs import abstract_model
from jax_avatar.planning.report import plan_as_dict, plan_as_text
from jax_avatar.planning.stream import DTYPES, plan_stream
from jax_avatar.planning.training import plan_training
from jax_avatar.streaming.plan import stream_layout
from launch import cli
from launch.cli import say

CONFIGS = Path(__file__).parents[1] / "configs"
TASKS = ["stream", "diffusion_forcing", "dmd"]
flags.DEFINE_string("model", "wan_s2v_14b", "a config of sizes: a name in configs/, or a .py file")
flags.DEFINE_string("mesh", "5", f"{cli.MESH}; training: 8, 4x2 or 16x8x1")
flags.DEFINE_string("hardware", "h200", "h100, h200, h800, v5e, v5p, v6e, v7x or cpu")
flags.DEFINE_enum("task", "stream", TASKS, "what the devices are to do")
flags.DEFINE_string("size", None, f"{cli.SIZE}; the model's usual if not given")
flags.DEFINE_enum("dtype", "bf16", DTYPES, cli.DTYPE)
flags.DEFINE_list("compile", ["step", "decode"], "parts to compile; the rest is only computed")
flags.DEFINE_bool("json", False, "print one JSON object instead of a table")
flags.DEFINE_enum("cache", None, ["per_step", "exit_only"], "dmd: history in training")
flags.DEFINE_integer("rank", None, "training: of the adapters, 0 for all weights", lower_bound=0)
FLAGS = flags.FLAGS


def read_config(name: str) -> dict:
    path = Path(name) if name.endswith(".py") else CONFIGS / f"{name}.py"
    if not os.path.isfile(path):
        raise ValueError(f"--model {name}: {path} does not exist; pass wan_s2v_14b or a .py file.")
    return load(path).get_config().to_dict()


def load(path: Path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def training_sections() -> dict:
    """Sections of the stage's config: its size of the model's name, or the paper's."""
    module = load(CONFIGS / f"{FLAGS.task}.py")
    name = "wan_s2v_14b"
    sections = module.get_config(name).to_dict()
    if FLAGS.cache:
        if FLAGS.task != "dmd":
            raise ValueError(f"--cache {FLAGS.cache} is for --task dmd; leave it out.")
        sections["rollout"]["cache"] = FLAGS.cache
    if FLAGS.rank is not None:
        sections["task"]["adapter_rank"] = FLAGS.rank
    if FLAGS.model != name:  # only what does not depend on the size
        sections["model"] = {"ring_blocks": sections["model"]["ring_blocks"]}
    sections["model"]["framepack"] = False  # no stage has motion frames as it is
    return sections


def frame_size(settings, size: str | None) -> tuple[int, int]:
    """Pixel height and width."""
    if size:
        return cli.parse_size(size)
    return settings.size or fit_size(400, 720, settings.max_area, settings.multiple)


def run() -> None:
    if unknown := set(FLAGS.compile) - {"step", "decode", ""}:
        raise ValueError(f"--compile {','.join(sorted(unknown))}: expected step, decode or both.")
    hardware = find_hardware(FLAGS.hardware)
    model = abstract_model(read_config(FLAGS.model))
    size = frame_size(model.settings, FLAGS.size)
    try:
        grid = model.vae.config.latent_grid(*size)
    except ValueError as error:
        raise ValueError(f"--size: {error}") from None
    if FLAGS.task == "stream":
        layout = stream_layout(model.settings, FLAGS.mesh)
        jax.config.update("jax_num_cpu_devices", layout.num_devices)
        options = {"dtype": FLAGS.dtype, "parts": tuple(FLAGS.compile), "say": say}
        needs = plan_stream(model, size, layout, hardware, **options)
    else:
        jax.config.update("jax_num_cpu_devices", parse_training_layout(FLAGS.mesh).num_devices)
        needs = plan_training(model, grid, FLAGS.mesh, hardware, training_sections(), say=say)
    header = {
        "model": model.name,
        "task": FLAGS.task,
        "mesh": FLAGS.mesh,
        "size": f"{size[0]}*{size[1]}",
        "dtype": FLAGS.dtype,
    }
    if FLAGS.json:
        print(json.dumps(header | plan_as_dict(needs, hardware)))
    else:
        print(", ".join(f"{key} {value}" for key, value in header.items()) + "\n")
        print(plan_as_text(needs, hardware))


if __name__ == "__main__":
    cli.run_with_flags(run)

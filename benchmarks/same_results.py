"""Compares latents of streams with those of another version of the code.

    git worktree add ../before HEAD~10
    (cd ../before && python benchmarks/same_results.py record ../before.npz)
    python benchmarks/same_results.py compare ../before.npz

Nano networks stream nine blocks in six layouts, with a renewed sink, with and without a change of
the prompt, and with the histories of the ablations. Weights, conditions and speech are in the
record, so that only the stream's code decides. Ends with 1 if some latent differs by more than
`--tolerance`, relative to the largest. Losses compare by `metrics.jsonl` of two runs of
`launch/train.py`.
"""

import os
import sys
from pathlib import Path

os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
)
os.environ.setdefault("JAX_PLATFORMS", "cpu")
sys.path.insert(0, str(Path(__file__).parents[1]))

import jax
import numpy as np
from tqdm import tqdm

from jax_avatar.layout import make_mesh, parse_layout
from jax_avatar.models.conditions import Conditions
from jax_avatar.models.network import Network, flatten, unflatten
from jax_avatar.streaming.pipeline import PipelinedStream
from jax_avatar.streaming.plan import StreamPlan
from jax_avatar.streaming.sampler import SequentialStream
from jax_avatar.testing import NANO, make_audio, make_conditions, make_network
from launch import cli

BLOCKS, CHANGE = 9, 5  # the window wraps twice; the prompt changes before block 5
LAYOUTS = ("1", "2", "3", "5", "4x2", "2x2+1")
HISTORIES = {
    "clean": {"refresh": "clean"},
    "fixed_renoise": {"refresh": "fixed", "sampler": "renoise"},
    "exit_only": {"cache": "exit_only"},
}
CONFIG = NANO.replace(framepack=False)


def parse_arguments(argv=None):
    parser = cli.Parser(description=__doc__.split("\n")[0])
    parser.add_argument("action", choices=("record", "compare"))
    parser.add_argument("file", type=Path, help="record, .npz")
    parser.add_argument("--tolerance", type=float, default=1e-6, help="relative to the largest")
    return parser.parse_args(argv)


def draw_inputs() -> dict[str, np.ndarray]:
    """Random weights, conditions and speech, by name."""
    conditions = make_conditions(CONFIG)
    new_text = jax.random.normal(jax.random.key(11), conditions.text.shape)
    inputs = {f"params/{key}": x for key, x in flatten(make_network(CONFIG).params).items()}
    inputs |= {key: getattr(conditions, key) for key in ("text", "reference", "pose")}
    inputs |= {"audio": make_audio(BLOCKS, CONFIG), "new_text": new_text}
    return {key: np.asarray(x) for key, x in inputs.items()}


def stream(
    inputs: dict[str, np.ndarray], layout: str, settings: dict, *, changes: bool
) -> np.ndarray:
    """Latents of a stream, blocks one after another."""
    params = {k.removeprefix("params/"): x for k, x in inputs.items() if k.startswith("params/")}
    network = make_network(CONFIG).with_params(unflatten(params))
    conditions = Conditions(**{key: inputs[key] for key in ("text", "reference", "pose")})
    running = open_stream(network, StreamPlan(**settings), conditions, layout)
    latents = []
    for g, audio in enumerate(inputs["audio"]):
        if changes and g == CHANGE:
            running.set_text(inputs["new_text"])
        latents += running.push(audio)
    return np.concatenate([np.asarray(x) for x in latents + running.finish()])


def open_stream(network: Network, plan: StreamPlan, conditions: Conditions, layout: str):
    if layout == "1":
        return SequentialStream(network, plan, conditions)
    mesh, _ = make_mesh(parse_layout(layout, plan.num_steps))
    return PipelinedStream(network, plan, conditions, mesh)


def cases() -> dict[str, tuple[str, dict, bool]]:
    """Name -> layout, settings, whether the prompt changes."""
    made = {}
    for name, changes in (("plain", False), ("prompt", True)):
        made |= {
            f"latents/{mesh}/{name}": (mesh, {"aas_after_blocks": 4}, changes) for mesh in LAYOUTS
        }
    for name, settings in HISTORIES.items():
        made[f"latents/1/{name}"] = ("1", {"aas_after_blocks": 1, **settings}, False)
    return made


def main() -> int:
    arguments = parse_arguments()
    if arguments.action == "record":
        inputs, known = draw_inputs(), {}
    else:
        with np.load(arguments.file, allow_pickle=False) as record:
            known = dict(record)
        inputs = {key: x for key, x in known.items() if not key.startswith("latents/")}
    found = {
        name: stream(inputs, layout, settings, changes=changes)
        for name, (layout, settings, changes) in tqdm(cases().items(), unit="stream")
    }
    if arguments.action == "record":
        np.savez(arguments.file, **inputs, **found)
        return cli.DONE
    worst = 0.0
    for name, latents in found.items():
        error = np.abs(latents - known[name]).max() / np.abs(known[name]).max()
        worst = max(worst, float(error))
        print(f"{name:32} {'equal' if error == 0 else f'{error:.1e}'}")
    return cli.DONE if worst <= arguments.tolerance else cli.FAILED


if __name__ == "__main__":
    cli.run(main)

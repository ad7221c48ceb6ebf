"""Training curves of runs side by side, from their `metrics.jsonl`.

    pip install ".[curves]"
    python benchmarks/curves.py runs/teacher runs/diffusion_forcing runs/dmd --out curves.png

A column for each run, a row for each kind of metric.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import matplotlib

from launch import cli

matplotlib.use("agg")
from matplotlib import pyplot

PANELS = {
    "losses": ("loss", "flow", "probe", "dmd_loss"),
    "errors and monitors": ("mouth_error", "mouth_error_high", "monitor/gap", "monitor/motion"),
    "sampled, held-out people": ("eval/lip_r", "eval/lip_amplitude", "eval/motion"),
}


def parse_arguments(argv=None) -> argparse.Namespace:
    parser = cli.Parser(description=__doc__.split("\n")[0])
    parser.add_argument("runs", nargs="+", type=Path, help="workdirs, or their metrics.jsonl")
    parser.add_argument("--out", type=Path, required=True, help="picture to write")
    parser.add_argument(
        "--clips_per_step", type=int, default=0, help="batch size: draws clips seen, not steps"
    )
    arguments = parser.parse_args(argv)
    if arguments.clips_per_step < 0:
        parser.error(f"--clips_per_step {arguments.clips_per_step} must be the size of a batch.")
    return arguments


def read_metrics(run: Path) -> list[dict]:
    """The lines of a run's log.

    Raises:
        FileNotFoundError: there is no log, or it is empty.
    """
    path = run / "metrics.jsonl" if run.is_dir() else run
    lines = path.read_text().splitlines() if path.is_file() else []
    if not lines:
        raise FileNotFoundError(f"{run} holds no metrics.jsonl with lines; name a run's workdir.")
    return [json.loads(line) for line in lines]


def series(lines: Sequence[dict], name: str) -> tuple[list[int], list[float]]:
    """Steps at which a metric was written, and its values."""
    found = [(line["step"], line[name]) for line in lines if name in line]
    return [step for step, _ in found], [value for _, value in found]


def draw(runs: Sequence[Path], out: Path, clips_per_step: int = 0) -> pyplot.Figure:
    """Writes the picture, over clips seen where their number per step is given."""
    logs = [read_metrics(run) for run in runs]
    size = (3.6 * len(runs), 2.2 * len(PANELS))
    figure, axes = pyplot.subplots(
        len(PANELS), len(runs), figsize=size, squeeze=False, sharex="col", layout="constrained"
    )
    for column, (run, lines) in enumerate(zip(runs, logs, strict=True)):
        axes[0][column].set_title(run.name if run.is_dir() else run.stem)
        axes[-1][column].set_xlabel("clips seen" if clips_per_step else "step")
        for row, (title, names) in enumerate(PANELS.items()):
            panel = axes[row][column]
            for name in names:
                steps, values = series(lines, name)
                if steps:
                    few = "o" if len(steps) < 8 else ""
                    label = name.rpartition("/")[2].replace("_", " ")
                    seen = [step * (clips_per_step or 1) for step in steps]
                    panel.plot(seen, values, marker=few, label=label, linewidth=1)
            if panel.lines:
                panel.legend(fontsize=7)
            panel.margins(y=0.1)
            panel.set_ylim(bottom=0)
            if column == 0:
                panel.set_ylabel(title)
    figure.savefig(out, dpi=110)
    pyplot.close(figure)
    return figure


def main(argv=None) -> None:
    arguments = parse_arguments(argv)
    draw(arguments.runs, arguments.out, arguments.clips_per_step)
    print(arguments.out)


if __name__ == "__main__":
    cli.run(main)

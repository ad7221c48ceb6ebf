"""Many command lines of one command in one process, which imports JAX once."""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
TRY = """
import importlib, json, sys
from absl import flags
from absl.testing import flagsaver
from launch import cli
module, lines = importlib.import_module(sys.argv[1]), json.loads(sys.argv[2])
for argv in lines:
    with flagsaver.flagsaver():
        sys.argv = ["command", *argv]  # read by ml_collections, for --config.x.y
        flags.FLAGS(sys.argv)
        print("code", cli.exit_code(module.run), file=sys.stderr)
"""


def refusals(module, lines, env):
    """Runs command lines that are to be refused: exit code, output on stderr of each."""
    done = subprocess.run(
        [sys.executable, "-c", TRY, module, json.dumps(lines)],
        capture_output=True, text=True, cwd=ROOT, env=env, timeout=300,
    )  # fmt: skip
    assert not done.stdout and "Traceback" not in done.stderr, done.stderr
    found, said = [], []
    for line in done.stderr.splitlines():
        if line.startswith("code "):
            found.append((int(line.removeprefix("code ")), "\n".join(said)))
            said = []
        else:
            said.append(line)
    assert len(found) == len(lines), done.stderr
    return found

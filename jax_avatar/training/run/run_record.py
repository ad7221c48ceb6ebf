"""Record of a run's start beside its metrics: one line of `runs.jsonl` per start."""

import datetime
import importlib.metadata
import json
import platform
import subprocess
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

__all__ = ["RUNS", "add_run_record", "run_record"]

RUNS = "runs.jsonl"
_PACKAGES = (
    *("jax_avatar", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy"),
    *("array_record", "tensorstore", "libtpu", "jax-cuda12-plugin", "jax-cuda13-plugin"),
)
_SOURCE = Path(__file__).parents[3]


def run_record(
    settings: Mapping[str, Any], first_step: int, *, command: Sequence[str] | None = None
) -> dict[str, Any]:
    """Facts about the start of a run, as plain values.

    Args:
        settings: of the run, with the hash of its data where it is known.
        first_step: 0, or the step of the checkpoint that the run goes on from.
        command: arguments of the process if not given.

    Returns:
        `time` (UTC), `first_step`, `command`, `settings`, `versions` of Python, packages and the
        devices' platform, `git`, `host`, `hosts`, and `devices` by kind.
    """
    versions = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    devices = jax.devices()
    versions["platform"] = " ".join(devices[0].client.platform_version.split())
    return {
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "first_step": first_step,
        "command": list(sys.argv if command is None else command),
        "settings": json.loads(json.dumps(settings)),
        "versions": versions,
        "git": git_state(_SOURCE),
        "host": platform.node(),
        "hosts": jax.process_count(),
        "devices": dict(Counter(device.device_kind for device in devices)),
    }


def add_run_record(workdir: Path, record: Mapping[str, Any]) -> None:
    """Appends a line to `runs.jsonl`."""
    with (workdir / RUNS).open("a") as file:
        file.write(json.dumps(record) + "\n")


def git_state(folder: Path) -> dict[str, Any] | None:
    """Commit of the source and whether tracked files differ from it; None without git."""

    def git(*arguments):
        command = ["git", "-C", str(folder), *arguments]
        return subprocess.run(
            command, capture_output=True, text=True, timeout=10, check=True
        ).stdout.strip()

    try:
        # A package in another project's environment has no commit of its own.
        if Path(git("rev-parse", "--show-toplevel")) != folder:
            return None
        changed = bool(git("status", "--porcelain", "--untracked-files=no"))
        return {"commit": git("rev-parse", "HEAD"), "changed": changed}
    except (OSError, subprocess.SubprocessError):
        return None

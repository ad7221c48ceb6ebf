"""Runs every golden case below the given folders and prints a table of errors.

    python -m conversion.verify FOLDER...

Exit code 0 if every tensor of every case is within its tolerance; 1 if one is not, or if a file
cannot be read or belongs to no kind of case; 2 if a folder does not exist.
"""

import json
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import jax

from conversion.cases import Case, Check, Kind
from conversion.cases_audio import (
    AudioFrontEndCases,
    BucketCases,
    BucketTables,
    Wav2Vec2Cases,
)
from conversion.cases_dit import DiTCases
from conversion.cases_manifests import Manifests
from conversion.cases_tables import RotaryCases, RoutingCases, SamplerTables
from conversion.cases_text import PromptCleaning, TextCases
from conversion.cases_training import TrainingCases
from conversion.cases_vae import VAECases
from conversion.readers import SafetensorsFile
from jax_avatar.weights.whole_file import check_whole
from launch import cli

__all__ = ["CASES", "main", "verify"]

CASES: tuple[Kind, ...] = (
    VAECases(),
    DiTCases(),
    RotaryCases(),
    RoutingCases(),
    SamplerTables(),
    TextCases(),
    PromptCleaning(),
    Wav2Vec2Cases(),
    BucketCases(),
    BucketTables(),
    AudioFrontEndCases(),
    TrainingCases(),
    Manifests(),
)
"""The kinds of golden cases; a new one is added here."""

Emit = Callable[[str, str, Check], None]


def verify(folders: Iterable[Path], emit: Emit, progress: Callable[[str], None]) -> int:
    """Verifies all cases below some folders.

    Args:
        folders: searched with everything below them.
        emit: called with kind, case and check, as soon as there is a result.
        progress: called with a line before each case.

    Returns:
        The number of cases.
    """
    found: list[tuple[Kind, Case]] = []
    for folder in _folders(folders):
        found += _find(folder, emit)
    for number, (kind, case) in enumerate(found, 1):
        progress(f"[{number}/{len(found)}] {kind.name} {case.name} ({case.files[0].parent})")
        began, count = time.monotonic(), 0
        try:
            for check in kind.run(case):
                emit(kind.name, case.name, check)
                count += 1
        # A broken case must not hide the others, whatever broke it.
        except Exception as error:
            emit(kind.name, case.name, _failure("(run)", error))
        progress(f"    {count} checks, {time.monotonic() - began:.1f} s")
    return len(found)


def _folders(roots: Iterable[Path]) -> list[Path]:
    folders = {}
    for root in roots:
        if not root.is_dir():
            raise ValueError(f"{root} is not a folder; give folders that hold golden files.")
        folders |= dict.fromkeys([root, *sorted(path for path in root.rglob("*") if path.is_dir())])
    return list(folders)


def _find(folder: Path, emit: Emit) -> list[tuple[Kind, Case]]:
    """Cases of one folder; every data file that is in none of them is a failure."""
    files = sorted(path for path in folder.iterdir() if path.suffix in (".safetensors", ".json"))
    readable = []
    for path in files:
        try:
            if path.suffix == ".json":
                check_whole(path, is_text=True)
                json.loads(path.read_text())
            else:
                SafetensorsFile(path)
            readable.append(path)
        except (OSError, ValueError) as error:
            emit("(file)", path.name, _failure("(read)", error))
    found: list[tuple[Kind, Case]] = []
    for kind in CASES:
        try:
            found += [(kind, case) for case in kind.find(readable)]
        except Exception as error:
            emit(kind.name, folder.name, _failure("(find)", error))
    used = {path for _, case in found for path in case.files}
    for path in readable:
        if path not in used:
            note = f"no kind of case knows this file; kinds: {', '.join(k.name for k in CASES)}"
            emit("(file)", path.name, Check("(unknown)", float("inf"), 0.0, note))
    return found


def _failure(tensor: str, error: Exception) -> Check:
    return Check(tensor, float("inf"), 0.0, f"{type(error).__name__}: {error}")


def _row(kind: str, case: str, check: Check) -> str:
    verdict = "ok" if check.passed else "FAIL"
    note = f"  {check.note}" if check.note else ""
    return (
        f"{kind + ' ' + case:24} {check.tensor:36} {check.error:9.2e} {check.tolerance:9.2e} "
        f"{verdict:4}{note}"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = cli.Parser(
        prog="python -m conversion.verify",
        description="Checks this implementation against golden files of the official one. "
        "Exit code 1 if any tensor is out of tolerance or any file is not understood.",
    )
    parser.add_argument("folders", nargs="+", type=Path, metavar="FOLDER", help="searched below")
    parser.add_argument(
        "--failures-only", action="store_true", help="leave rows within tolerance out of the table"
    )
    options = parser.parse_args(arguments)
    return cli.exit_code(lambda: _run(options.folders, options.failures_only))


def _run(folders: Sequence[Path], failures_only: bool) -> int:
    cli.check_devices()  # else every case would fail
    checks: list[Check] = []

    def emit(kind: str, case: str, check: Check) -> None:
        checks.append(check)
        if not (check.passed and failures_only):
            print(_row(kind, case, check), flush=True)

    print(f"{'case':24} {'tensor':36} {'max error':>9} {'tolerance':>9} verdict", flush=True)
    with jax.default_matmul_precision("highest"):
        cases = verify(folders, emit, cli.say)
    failed = sum(not check.passed for check in checks)
    if not cases and not failed:
        print("FAIL: no golden case below " + ", ".join(map(str, folders)))
        return cli.FAILED
    print(
        f"{'FAIL' if failed else 'ok'}: {cases} cases, {len(checks)} checks, "
        f"{len(checks) - failed} within tolerance, {failed} failed"
    )
    return cli.FAILED if failed else cli.DONE


if __name__ == "__main__":
    sys.exit(main())

"""Plants mistakes in copies of the code, one by one, and sees that tests notice them.

    python -m tests.planted                all that take seconds
    python -m tests.planted 3 16 input     some of them
    python -m tests.planted --what "clip"  those whose words match a pattern
    python -m tests.planted --slow         only those that take minutes

A mistake is noticed where each test named in its row fails: not by being missing, and not because
the changed code cannot run at all. Ends with 1 if some mistake was not noticed.
"""

import argparse
import functools
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

from tqdm import tqdm

from tests.planted.conversation import CONVERSATION
from tests.planted.damage import DAMAGE
from tests.planted.ignored import IGNORED
from tests.planted.inputs import INPUTS
from tests.planted.invariants import INVARIANTS
from tests.planted.mistake import Mistake
from tests.planted.operations import OPERATIONS
from tests.planted.settings import SETTINGS

__all__ = ["MISTAKES", "Outcome", "judge"]

ROOT = Path(__file__).parents[2]
MISTAKES = (*INVARIANTS, *INPUTS, *DAMAGE, *OPERATIONS, *SETTINGS, *IGNORED, *CONVERSATION)
KINDS = "1 to 21, input, run, setting or ignored"
COPIED = ("jax_avatar", "tests", "configs", "conversion", "launch", "pyproject.toml")
LINKED = ("jax_avatar/assets", "tests/golden")  # large, and nobody writes there
TIMEOUT_S = 1800
_CANNOT_RUN = re.compile(
    r"\b(SyntaxError|NameError|UnboundLocalError|ImportError|ModuleNotFoundError|AttributeError"
    r"|TypeCheckError|fixture '\w+' not found)\b"
)


@dataclass(frozen=True)
class Outcome:
    """What tests said of a mistake: whether all noticed, in what words, in how many seconds."""

    is_noticed: bool
    said: str
    seconds: float = 0.0


def judge(tests: Sequence[str], report: ElementTree.Element) -> Outcome:
    """What a pytest report in JUnit's form says of a planted mistake.

    Args:
        tests: ids of which each must have failed in at least one case.
        report: of the run.
    """
    cases = list(report.iter("testcase"))
    said = ""
    for test in tests:
        own = [case for case in cases if test in (_id(case), _id(case).partition("[")[0])]
        if not own:
            return Outcome(False, f"{test} was not found, or could not be collected")
        if any(case.find("error") is not None for case in own):
            return Outcome(False, f"{test} could not be set up")
        failures = [case.find("failure") for case in own if case.find("failure") is not None]
        if not failures:
            return Outcome(False, f"{test} passed")
        text = f"{failures[0].get('message', '')}\n{failures[0].text or ''}"
        if found := _CANNOT_RUN.search(text):
            return Outcome(False, f"{test} could not run: {found[0]}")
        said = said or " ".join(failures[0].get("message", "").split())
    return Outcome(True, said)


def _id(case: ElementTree.Element) -> str:
    return f"{case.get('classname', '').replace('.', '/')}.py::{case.get('name')}"


def _copy(root: Path) -> None:
    root.mkdir()
    for name in COPIED:
        if (ROOT / name).is_file():
            shutil.copy2(ROOT / name, root / name)
            continue
        linked = {ROOT / path for path in LINKED}

        def skipped(folder, names, linked=linked):
            return [name for name in names if Path(folder) / name in linked]

        shutil.copytree(ROOT / name, root / name, ignore=skipped)
    for path in LINKED:
        (root / path).symlink_to(ROOT / path, target_is_directory=True)


def _pytest(root: Path, *arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "pytest", "-n", "0", "-m", "", "-p", "no:cacheprovider"]
    environment = os.environ | {"PYTHONPATH": str(root), "JAX_PLATFORMS": "cpu"}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    environment.setdefault("JAX_CACHE_DIR", str(ROOT / ".jax_cache"))
    # Most of what is compiled is small, and the same as for the mistake before.
    environment["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    return subprocess.run(
        [*command, *arguments],
        cwd=root, env=environment, timeout=TIMEOUT_S, capture_output=True, text=True,
    )  # fmt: skip


def _try(base: Path, mistake: Mistake) -> Outcome:
    """Makes a mistake in a copy of its own and runs its tests there."""
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        root, report = Path(folder) / "code", Path(folder) / "report.xml"
        # With times, so that modules compiled for `base` stay valid, but for the one that changes.
        shutil.copytree(base, root, symlinks=True)
        try:
            mistake.plant(root)
            run = _pytest(root, f"--junitxml={report}", f"--basetemp={folder}/tmp", *mistake.tests)
        except ValueError as error:
            return Outcome(False, str(error))
        except subprocess.TimeoutExpired:
            return Outcome(False, f"no end after {TIMEOUT_S} s", time.monotonic() - started)
        if run.returncode not in (0, 1) or not report.exists():
            said = f"pytest ended with {run.returncode}: {run.stdout[-300:]}{run.stderr[-300:]}"
            outcome = Outcome(False, " ".join(said.split()))
        else:
            outcome = judge(mistake.tests, ElementTree.parse(report).getroot())
    return Outcome(outcome.is_noticed, outcome.said, time.monotonic() - started)


def _table(mistakes: Sequence[Mistake], outcomes: Sequence[Outcome]) -> Iterator[str]:
    width = max(len(mistake.what) for mistake in mistakes)
    for mistake, outcome in zip(mistakes, outcomes, strict=True):
        word = "noticed" if outcome.is_noticed else "MISSED"
        said = outcome.said[:60] if outcome.is_noticed else outcome.said
        row = f"{mistake.number:>5}  {mistake.what:{width}}  {word:7}  {outcome.seconds:4.0f} s"
        yield f"{row}  {said}"


def _chosen(numbers: Sequence[str], what: str, slow: bool) -> list[Mistake]:
    known = {str(mistake.number) for mistake in MISTAKES}
    if unknown := sorted(set(numbers) - known):
        raise ValueError(f"no mistakes are numbered {', '.join(unknown)}; give {KINDS}.")
    numbered = [m for m in MISTAKES if m.slow == slow and (not numbers or str(m.number) in numbers)]
    return [m for m in numbered if re.search(what, m.what)]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        "tests.planted", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("numbers", nargs="*", help=f"invariants {KINDS}; all if not given")
    parser.add_argument("--what", default="", help="pattern that their words must match")
    parser.add_argument("--slow", action="store_true", help="those whose tests take minutes")
    parser.add_argument("--jobs", type=int, default=1, help="mistakes tried at the same time")
    options = parser.parse_args(argv)
    try:
        mistakes = _chosen(options.numbers, options.what, options.slow)
    except ValueError as error:
        parser.error(str(error))
    if not mistakes:
        parser.error("no such mistakes; with or without --slow or --what there are others.")
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(options.jobs) as pool:
        base = Path(folder) / "code"
        _copy(base)
        files = {test.partition("::")[0] for mistake in mistakes for test in mistake.tests}
        _pytest(base, "--collect-only", *sorted(files))  # compiles modules, once for all
        tried = pool.map(functools.partial(_try, base), mistakes)
        outcomes = list(tqdm(tried, total=len(mistakes), unit="mistake"))
    print("\n".join(_table(mistakes, outcomes)))
    missed = sum(not outcome.is_noticed for outcome in outcomes)
    minutes = (time.monotonic() - started) / 60
    print(f"{len(mistakes) - missed} of {len(mistakes)} noticed in {minutes:.1f} minutes")
    return int(missed > 0)


if __name__ == "__main__":
    sys.exit(main())

"""The command as a user runs it, on a tiny model."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.launch.one_process import refusals
from tests.planning.test_stream import NANO_FOLDER

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    path = tmp_path_factory.mktemp("plan") / "nano.py"
    plain = NANO_FOLDER | {"dit": {k: v for k, v in NANO_FOLDER["dit"].items() if "dtype" not in k}}
    lines = ["from ml_collections import ConfigDict", "", "def get_config():"]
    path.write_text("\n".join([*lines, f"    return ConfigDict({plain!r})", ""]))
    return path


def environment():
    return {key: value for key, value in os.environ.items() if key != "XLA_FLAGS"}


def run(*flags):
    command = [sys.executable, str(ROOT / "launch" / "plan.py"), *map(str, flags)]
    return subprocess.run(command, capture_output=True, text=True, env=environment(), timeout=500)


def test_a_tiny_stream_is_planned(config):
    result = run(f"--model={config}", "--mesh=2x2+1", "--hardware=h200", "--json")
    assert result.returncode == 0, result.stderr
    plan = json.loads(result.stdout)
    assert plan["model"] == "nano" and plan["size"] == "64*64" and plan["fits"]
    assert [device["count"] for device in plan["devices"]] == [4, 1]
    sources = {f["source"] for device in plan["devices"] for f in device["bytes"].values()}
    assert sources == {"compiled", "computed"}
    assert plan["hardware"]["bandwidth_gb_s"] == 4800
    assert "compiling for cpu" in result.stderr


@pytest.mark.slow
def test_a_table_says_where_numbers_are_from(config):
    result = run(f"--model={config}", "--mesh=1", "--hardware=cpu", "--compile=step")
    assert result.returncode == 0, result.stderr
    rows = {line[:54].strip(): line.split()[-1] for line in result.stdout.splitlines() if line}
    assert rows["weights"] == "computed" and rows["temporaries"] == "cpu"
    assert "not compiled, so temporaries are missing: decode" in result.stdout
    assert "nothing is published about this hardware" in result.stdout


def test_what_cannot_be_planned_is_one_clear_error():
    cases = {
        ("--mesh=7",): "--mesh 7: 4 timesteps",
        ("--task=dmd", "--mesh=4by2"): "training mesh '4by2': expected DATAxMODEL",
        ("--size=384:704",): "--size 384:704: expected HEIGHT*WIDTH",
    }
    answers = refusals("launch.plan", list(cases), environment())
    for (code, said), message in zip(answers, cases.values(), strict=True):
        assert code == 2 and message in said.splitlines()[-1]

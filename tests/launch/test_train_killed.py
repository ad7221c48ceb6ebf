"""A training run that is killed and started again is the run that was not."""

import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.numpy import load_file

from jax_avatar.training.run.clock import is_timing

ROOT = Path(__file__).parents[2]


def start(workdir, cache):
    command = [
        *(sys.executable, "launch/train.py", "--config=configs/dmd.py:tiny"),
        *(f"--workdir={workdir}", "--config.loop.num_steps=12", "--config.loop.log_every=2"),
        *("--config.loop.checkpoint_every=3", "--config.loop.evaluate_every=0"),
        *("--config.task.generator_every=2", "--config.task.ema_start=4"),
    ]
    environment = {key: value for key, value in os.environ.items() if key != "XLA_FLAGS"} | {
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.5",
    }
    with (workdir.parent / "log.txt").open("a") as log:
        return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log)


def read_log(workdir):
    path = workdir / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    rows = [json.loads(line) for line in lines if line.endswith("\n")]
    return [{k: v for k, v in row.items() if not is_timing(k)} for row in rows]


@pytest.mark.slow
def test_killed_at_a_random_step_it_ends_with_the_same_curve_and_weights(tmp_path):
    whole, cut, cache = tmp_path / "whole", tmp_path / "cut", tmp_path / "cache"
    assert start(whole, cache).wait(1500) == 0, (tmp_path / "log.txt").read_text()[-2000:]
    begun, lines = random.SystemRandom().uniform(0, 1), random.SystemRandom().randint(0, 4)
    process = start(cut, cache)
    while len(read_log(cut)) < lines and process.poll() is None:
        time.sleep(0.02)
    time.sleep(begun * (30 if not lines else 1))
    process.kill()
    assert process.wait() == -9, f"killed too late, {begun:.2f} after line {lines}"
    killed_at = [row["step"] for row in read_log(cut)]
    assert start(cut, cache).wait(1500) == 0, (tmp_path / "log.txt").read_text()[-2000:]
    message = f"killed {begun:.2f} after line {lines}, with lines {killed_at}"
    assert [row["step"] for row in read_log(cut)] == [2, 4, 6, 8, 10, 12], message
    assert read_log(cut) == read_log(whole), message
    # Not the files, whose metadata come in any order.
    tensors = [load_file(folder / "dit.safetensors") for folder in (whole, cut)]
    assert tensors[0].keys() == tensors[1].keys() and len(tensors[0]) > 50
    for name, tensor in tensors[0].items():
        assert tensor.tobytes() == tensors[1][name].tobytes(), f"{name}, {message}"

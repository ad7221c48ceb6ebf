"""Two hosts train what one host with two devices does."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from jax_avatar.weights.files import load_weights
from launch.hosts import join_hosts

ROOT = Path(__file__).parents[2]
RUN = """
import sys

import jax

folder, hosts, host, port, devices = sys.argv[1:]
jax.config.update("jax_num_cpu_devices", int(devices))
from launch.hosts import join_hosts

if int(hosts) > 1:
    join_hosts(True, f"localhost:{port}", int(hosts), int(host))
import numpy as np
from jax_avatar.weights.files import save_weights
from jax_avatar.models import sharding
from jax_avatar.training.run.evaluation import AverageEvaluation
from jax_avatar.training.run.loop import train
from jax_avatar.training.run.step import LoopConfig
from jax_avatar.training.stages.task import LossTask

sharding.SMALL = 1  # every weight is cut


class Line(LossTask):
    name, batch_size, by_clip = "line", 4, True
    asked = set()

    def init(self, key):
        return {"line": {"kernel": jax.random.normal(key, (4, 2))}}

    def batches(self, step, rows=None):
        rows = np.arange(4) if rows is None else rows
        self.asked |= set(rows.tolist())
        x = np.random.default_rng(step).standard_normal((4, 4)).astype(np.float32)[rows]
        return {"x": x, "y": x[:, :2] + 3}

    def loss(self, params, batch, key):
        noise = 0.1 * jax.random.normal(key, batch["y"].shape)
        return ((batch["x"] @ params["line"]["kernel"] - batch["y"] + noise) ** 2).mean(), {}

    def evaluations(self, config, mesh):
        def size(params, step):
            return {"size": float(abs(params["line"]["kernel"]).max())}

        return [AverageEvaluation(size)]

    def export(self, params, folder, metadata):
        save_weights(folder, "line", params, {}, metadata)


task = Line()
loop = LoopConfig(
    num_steps=4, warmup_steps=0, log_every=1, evaluate_every=2, checkpoint_every=2, mesh="2"
)
state = train(task, loop, folder, progress=False)
kernel = state.params["line"]["kernel"]
assert {shard.data.shape for shard in kernel.addressable_shards} == {(2, 2)}
assert len(task.asked) == (4 if int(hosts) == 1 else 2), task.asked
"""


def start(*arguments):
    return start_command([sys.executable, "-c", RUN, *map(str, arguments)])


def start_command(command):
    """A process of its own, without the devices and settings of this one."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("XLA_", "JAX_"))}
    kept |= {"JAX_PLATFORMS": "cpu", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    kept |= {"PYTHONPATH": str(ROOT)}
    return subprocess.Popen(command, env=kept, stderr=subprocess.PIPE, text=True, cwd=ROOT)


def finish(*processes, timeout=500):
    try:
        for process in processes:
            _, said = process.communicate(timeout=timeout)
            assert process.returncode == 0, said[-3000:]
    finally:
        for process in processes:  # one alone would wait for the others
            process.kill()


def free_port():
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


def test_two_hosts_train_what_two_devices_of_one_do(tmp_path):
    port = free_port()
    finish(
        start(tmp_path / "one", 1, 0, port, 2),
        *(start(tmp_path / "two", 2, host, port, 1) for host in (0, 1)),
    )
    one, two = (load_weights(tmp_path / name, "line")[0] for name in ("one", "two"))
    np.testing.assert_allclose(two["line"]["kernel"], one["line"]["kernel"], atol=1e-6)
    logs = [(tmp_path / name / "metrics.jsonl").read_text().splitlines() for name in ("one", "two")]
    assert len(logs[0]) == len(logs[1]) == 6


def test_what_is_missing_to_join_is_named(monkeypatch):
    for name in ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"):
        monkeypatch.delenv(name, raising=False)
    join_hosts(False, None, None, None)  # alone
    with pytest.raises(ValueError, match=r"missing: --hosts .*JAX_NUM_PROCESSES.*, --host "):
        join_hosts(False, "localhost:1234", None, None)
    with pytest.raises(ValueError, match="--host 2 of --hosts 2: hosts are numbered from 0"):
        join_hosts(True, "localhost:1234", 2, 2)

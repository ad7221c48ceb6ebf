"""Two hosts train what one host with two devices does."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from jax_avatar.io.checkpoint import load_weights
from launch.hosts import join_hosts
from tests import nano

ROOT = Path(__file__).parents[2]
RUN = """
import sys

import jax

folder, model, hosts, host, port, devices = sys.argv[1:]
jax.config.update("jax_num_cpu_devices", int(devices))
from launch.hosts import join_hosts

if int(hosts) > 1:
    join_hosts(True, f"localhost:{port}", int(hosts), int(host))
jax.config.update("jax_disable_most_optimizations", True)
from jax_avatar.training.distillation import DistillConfig
from jax_avatar.training.distillation_task import DistillTask, DistillWeights
from jax_avatar.training.latents import random_clips
from jax_avatar.training.loop import LoopConfig, train
from jax_avatar.training.rollout import RolloutConfig
from tests import nano

config = nano.CONFIG.replace(framepack=False)
settings = DistillConfig(
    batch_size=2, latents=3, generator_every=2, adapter_rank=2, critic_learning_rate=1e-3
)
rollout = RolloutConfig(sigmas=(1.0, 0.8, 0.0), shift_max=20)
clips = random_clips(3, 7, (4, 4), 4, (2, 6))
task = DistillTask(config, rollout, settings, DistillWeights(model, model), clips)
loop = LoopConfig(
    num_steps=2, warmup_steps=0, betas=(0.5, 0.999), log_every=1, checkpoint_every=2, mesh="2"
)
state = train(task, loop, folder, progress=False)
assert int(state.step) == 2
"""


def start(*arguments):
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("XLA_", "JAX_"))}
    kept |= {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", RUN, *map(str, arguments)]
    return subprocess.Popen(command, env=kept, stderr=subprocess.PIPE, text=True, cwd=ROOT)


def finish(*processes):
    for process in processes:
        _, said = process.communicate(timeout=500)
        assert process.returncode == 0, said[-3000:]


def free_port():
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


@pytest.mark.slow
def test_two_hosts_train_what_two_devices_of_one_do(tmp_path):
    model, port = nano.save_model(tmp_path / "model"), free_port()
    finish(start(tmp_path / "one", model, 1, 0, port, 2))
    finish(*(start(tmp_path / "two", model, 2, host, port, 1) for host in (0, 1)))
    one, two = (load_weights(tmp_path / name, "lora")[0] for name in ("one", "two"))
    assert len((tmp_path / "two" / "metrics.jsonl").read_text().splitlines()) == 2
    import jax

    for a, b in zip(jax.tree.leaves(two), jax.tree.leaves(one), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)


def test_what_is_missing_to_join_is_named(monkeypatch):
    for name in ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"):
        monkeypatch.delenv(name, raising=False)
    join_hosts(False, None, None, None)  # alone
    with pytest.raises(ValueError, match=r"missing: --hosts .*JAX_NUM_PROCESSES.*, --host "):
        join_hosts(False, "localhost:1234", None, None)
    with pytest.raises(ValueError, match="--host 2 of --hosts 2: hosts are numbered from 0"):
        join_hosts(True, "localhost:1234", 2, 2)

"""Times and rates of a run, and traces of its steps."""

import dataclasses
import gzip
import json
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_avatar import testing
from jax_avatar.layout import make_training_mesh
from jax_avatar.models.conditions import Conditions
from jax_avatar.models.dit import DiT
from jax_avatar.models.network import Network
from jax_avatar.planning.hardware import HARDWARE
from jax_avatar.planning.work import clip_flops, step_work
from jax_avatar.training.distill_state import DistillConfig
from jax_avatar.training.rollout_plan import RolloutConfig
from jax_avatar.training.run.clock import PHASES, StepClock, Work, memory_peak
from jax_avatar.training.run.loop import train
from jax_avatar.training.run.step import LoopConfig
from jax_avatar.training.stages.flow import ForcingConfig
from tests.training.run.test_loggers import CONFIG, Still, read

BATCH = {"x": np.zeros(2)}


class Device:
    """Does one step after the other, each in the same time."""

    def __init__(self, seconds):
        self.seconds, self.free = seconds, 0.0

    def step(self):
        self.free = max(self.free, time.monotonic()) + self.seconds
        return Result(self.free)


@dataclasses.dataclass
class Result:
    ready: float

    def block_until_ready(self):
        time.sleep(max(0, self.ready - time.monotonic()))
        return self


def make_steps(clock, device, count, load=0.0):
    def batches():
        for _ in range(count):
            time.sleep(load)
            yield BATCH

    for batch in clock.waiting(batches()):
        with clock.step(batch) as results:
            results.append(device.step())


@pytest.mark.parametrize(("load", "seconds"), [(0.15, 0.03), (0.01, 0.1)])
def test_waiting_for_data_counts_only_while_the_devices_are_idle(load, seconds):
    with StepClock() as clock:
        make_steps(clock, device := Device(seconds), 1)
        clock.read()
        make_steps(clock, device, 4, load)
        times = clock.read()
    assert 4 * seconds * 0.9 < times["time/step"] < 4 * seconds + 0.1
    if load > seconds:
        # As long as a batch is late, less what the devices still had to do.
        assert 0.9 * 4 * load - 3 * seconds < times["time/data"] < 4 * load - 2 * seconds
    else:
        assert times["time/data"] < 0.25 * times["time/step"]
    assert times["time/compile"] == times["time/evaluation"] == 0


def test_rates_are_of_the_interval_without_compilation_and_evaluation():
    work = Work(clips=3, tokens=30, flops=7.0, peak_flops=1e3)
    with StepClock(work) as clock:
        make_steps(clock, Device(0.4), 1)
        first = clock.read()
        make_steps(clock, Device(0.02), 5)
        with clock.phase("evaluation"):
            time.sleep(0.5)
        second = clock.read()
    assert first["time/compile"] > 0.35 and "steps_per_s" not in first
    assert second["time/evaluation"] > 0.35 and second["time/compile"] == 0
    assert 20 < second["steps_per_s"] < 51  # 9 or fewer with the evaluation
    rates = [second[name] / second["steps_per_s"] for name in ("clips_per_s", "tokens_per_s")]
    assert rates == pytest.approx([3, 30]) and second["mfu"] * 1e3 == pytest.approx(
        7 * second["steps_per_s"]
    )


def test_what_is_not_known_is_left_out():
    with StepClock(Work(clips=3, flops=7.0)) as clock:
        make_steps(clock, Device(0), 2)
        found = clock.read()
    assert "mfu" not in found and "tokens_per_s" not in found and "clips_per_s" in found


class Card:
    """A device that answers as backends do."""

    def __init__(self, answer):
        self.answer = answer

    def memory_stats(self):
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer


def test_memory_is_left_out_where_a_backend_does_not_count():
    silent = [Card(None), Card({"bytes_in_use": 3}), Card(NotImplementedError()), object()]
    assert memory_peak(silent) is None
    counted = [Card({"peak_bytes_in_use": size * 10**9}) for size in (2, 5, 3)]
    assert memory_peak([*silent, *counted]) == 5
    assert memory_peak(jax.devices("cpu")) is None


def test_operations_of_a_clip_are_those_the_compiler_counts():
    frames, grid = 6, (16, 16)
    config = testing.NANO.replace(
        width=256, ffn_width=1024, num_layers=1, text_len=32, framepack=False, attention="xla"
    )
    network = Network.abstract(DiT, config)

    def forward(network, noisy, text, features):
        portrait = noisy[:, :1]
        timestep = jnp.ones((1, frames))
        conditions = Conditions(text=text, reference=portrait, pose=noisy, audio=features)
        return network.bind().bidirectional(noisy, timestep, conditions)

    shapes = (
        (1, frames, *grid, config.latent_channels),
        (1, config.text_len, config.text_width),
        (1, 1, 4 * frames, config.audio_layers, config.audio_width),
    )
    arguments = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    counted = jax.jit(forward).lower(network, *arguments).cost_analysis()["flops"]
    assert sum(clip_flops(config, grid, frames)) == pytest.approx(counted, rel=0.05)


def test_work_of_a_step_follows_batch_clips_adapters_and_hardware(monkeypatch):
    mesh = make_training_mesh("1x1", 2)
    config = testing.NANO

    def work(stage="teacher", **settings):
        kind = DistillConfig if stage == "dmd" else ForcingConfig
        task = kind(**{"batch_size": 2, "latents": 6, **settings})
        sections = {"model": config, "task": task, "rollout": RolloutConfig()}
        return step_work(stage, sections, task.batch_size, testing.GRID, mesh)

    one = work()
    assert one.peak_flops == 0 and one.clips == 2 and one.tokens == 2 * 6 * 16
    assert one.flops == 2 * 3 * sum(clip_flops(config, testing.GRID, 6))
    assert work(batch_size=4).flops == 2 * one.flops
    assert work(adapter_rank=2).flops < one.flops
    often, rare = (work("dmd", generator_every=n, guidance_scale=4.0).flops for n in (1, 5))
    assert one.flops < rare < often
    assert work("dmd", generator_every=1, guidance_scale=1.0).flops < often
    monkeypatch.setattr("jax_avatar.planning.work.recognise", lambda kind: HARDWARE["h100"])
    assert work().peak_flops == 989.5e12


def test_every_log_line_has_times_and_a_rate(tmp_path):
    work = Work(clips=2, flops=1.0, peak_flops=1e12)
    train(Still(), CONFIG, tmp_path, progress=False, work=work)
    for line in read(tmp_path / "metrics.jsonl"):
        assert {f"time/{name}" for name in PHASES} | {"steps_per_s", "clips_per_s"} <= line.keys()
        assert 0 < line["mfu"] < 1e-6 * line["steps_per_s"]


def test_steps_are_traced_where_asked(tmp_path):
    traced = dataclasses.replace(CONFIG, profile="1:3")
    train(Still(), traced, tmp_path, progress=False)
    (path,) = tmp_path.glob("profile/plugins/profile/*/*.trace.json.gz")
    events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
    steps = {event["args"]["step_num"] for event in events if event.get("name") == "train"}
    assert {int(step) for step in steps} == {1, 2}


@pytest.mark.parametrize("text", ["3", "3:3", "5:2", "a:b", "-1:2", "1:99"])
def test_a_range_that_cannot_be_traced_is_named(text):
    with pytest.raises(ValueError, match=rf"loop\.profile='?{text}"):
        LoopConfig(num_steps=4, warmup_steps=0, profile=text)

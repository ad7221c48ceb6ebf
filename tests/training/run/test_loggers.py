"""Loggers, the record of a run's starts, and what is told where a library is missing."""

import dataclasses
import json
import sys
import types

import jax
import jax.numpy as jnp
import pytest

from jax_avatar.training.run.journal import Journal
from jax_avatar.training.run.loop import train
from jax_avatar.training.run.run_record import git_state, run_record
from jax_avatar.training.run.step import LoopConfig
from jax_avatar.training.stages.task import LossTask

CONFIG = LoopConfig(num_steps=4, warmup_steps=0, log_every=2, checkpoint_every=4)


class Still(LossTask):
    """One weight that a constant gradient moves."""

    name, content_hash = "still", "cafe"

    def init(self, key):
        return {"weight": jax.random.normal(key, (2, 2))}

    def loss(self, params, batch, key):
        return jnp.sum(params["weight"] * batch["x"]), {}

    def batches(self, step):
        return {"x": jnp.ones((2, 2))}


class FakeWandb(types.ModuleType):
    """The part of W&B's library that is used; keeps what it is given."""

    def __init__(self, fails=False):
        super().__init__("wandb")
        self.__spec__ = types.SimpleNamespace(name="wandb")
        self.errors = types.SimpleNamespace(Error=type("Error", (Exception,), {}))
        self.fails, self.started, self.rows, self.finished = fails, [], [], 0

    def init(self, **options):
        if self.fails:
            raise self.errors.Error("api_key not configured (no-tty).\nCall wandb.login")
        self.started.append(options)
        return self

    def define_metric(self, name, step_metric):
        assert (name, step_metric) == ("*", "step")

    def log(self, row):
        self.rows.append(row)

    def finish(self):
        self.finished += 1


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_metrics_go_to_every_logger_and_a_resumed_run_is_the_same_one_there(tmp_path, monkeypatch):
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    config = dataclasses.replace(CONFIG, wandb="talking-heads")
    settings = {"model": {"width": 8}}
    train(Still(), config, tmp_path, settings=settings, progress=False)
    first = read(tmp_path / "metrics.jsonl")
    assert [row["step"] for row in first] == [2, 4] and fake.rows == first
    assert list((tmp_path / "events").iterdir()) and fake.finished == 1
    train(Still(), config, tmp_path, settings=settings, progress=False)
    one, other = fake.started
    assert one["id"] == other["id"] and one["resume"] == "allow"
    assert one["project"] == "talking-heads" and one["name"] == tmp_path.name
    assert one["config"]["model"] == {"width": 8} and one["config"]["loop"]["num_steps"] == 4


def test_a_missing_or_refusing_library_is_one_clear_line_before_the_first_step(
    tmp_path, monkeypatch
):
    config = dataclasses.replace(CONFIG, wandb="talking-heads")
    for module, said in [(None, "wandb is not installed"), (FakeWandb(fails=True), "wandb login")]:
        monkeypatch.setitem(sys.modules, "wandb", module)
        with pytest.raises(ValueError, match=said) as error:
            train(Still(), config, tmp_path, progress=False)
        assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match=r"loop\.wandb='me/talking'.*WANDB_ENTITY"):
        LoopConfig(num_steps=1, warmup_steps=0, wandb="me/talking")


def test_missing_event_files_are_told(tmp_path, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    with Journal(tmp_path, 0) as journal:
        journal.write(1, {"loss": 1.0})
    assert "tensorboardX is not installed" in caplog.text
    assert read(tmp_path / "metrics.jsonl") == [{"step": 1, "loss": 1.0}]


def test_every_start_is_recorded(tmp_path):
    settings = {"model": {"layers": (1, 2)}}
    short = dataclasses.replace(CONFIG, max_minutes=1e-9)
    train(Still(), short, tmp_path, settings=settings, progress=False)
    train(Still(), CONFIG, tmp_path, settings=settings, progress=False)
    starts = read(tmp_path / "runs.jsonl")
    assert [start["first_step"] for start in starts] == [0, 1]
    told = starts[1]["settings"]
    assert told["model"] == {"layers": [1, 2]} and told["data_hash"] == "cafe"
    assert told["loop"]["log_every"] == 2  # bookkeeping, too
    assert starts[0]["settings"]["loop"]["max_minutes"] == 1e-9
    assert starts[0]["hosts"] == 1 and sum(starts[0]["devices"].values()) == jax.device_count()
    assert starts[0]["versions"]["jax"] == jax.__version__ and starts[0]["command"] == sys.argv


def test_a_source_without_git_has_no_commit(tmp_path):
    assert git_state(tmp_path) is None
    assert {"time", "git", "host"} <= run_record({}, 0).keys()

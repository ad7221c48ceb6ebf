"""Batches are the same whoever makes them ahead; what breaks costs no step."""

import dataclasses
import os
import threading

import jax
import numpy as np
import pytest
from absl import flags

from jax_avatar.data.latents import random_clips
from jax_avatar.data.windows import Windows
from jax_avatar.training.run.loader import DataError, load_batches
from jax_avatar.training.run.loop import train
from jax_avatar.training.run.step import LoopConfig
from tests.training.run.test_loggers import CONFIG, Still, read

WINDOWS = Windows(random_clips(5, 12, (2, 2), 2, (1, 2)), 6, 3, seed=[0, 1])


class Marked:
    """Batches with the process that made them; one of them cannot be made."""

    def __init__(self, bad_step=None):
        self.bad_step = bad_step

    def __call__(self, step):
        if step == self.bad_step:
            raise OSError("shard 3\nis gone")
        return {**WINDOWS.batch(step), "process": np.full(3, os.getpid())}


def loaded(first, last, workers, source=None):
    batches = load_batches(source or Marked(), lambda batch: batch, first, last, workers=workers)
    return [(step, {name: np.array(value) for name, value in b.items()}) for step, b in batches]


@pytest.fixture(scope="module")
def by_processes():
    """Steps 3 to 7, made by two processes, as a run does that resumes at 3."""
    flags.FLAGS.mark_as_parsed()
    return loaded(3, 8, 2)


def test_batches_depend_on_their_step_alone(by_processes):
    here = loaded(0, 8, 0)
    assert [step for step, _ in here] == [*range(8)]
    assert [step for step, _ in by_processes] == [*range(3, 8)]
    for (step, batch), (_, other) in zip(here[3:], by_processes, strict=True):
        for name, value in WINDOWS.batch(step).items():
            np.testing.assert_array_equal(batch[name], value)
            np.testing.assert_array_equal(other[name], value)


def test_as_many_processes_as_asked_for_make_them(by_processes):
    made_by = [int(batch["process"][0]) for _, batch in by_processes]
    assert len(set(made_by)) == 2 and os.getpid() not in made_by
    assert {int(batch["process"][0]) for _, batch in loaded(0, 2, 0)} == {os.getpid()}


def test_nothing_is_left_when_a_run_stops_early():
    before = threading.active_count()
    batches = load_batches(Marked(), lambda batch: batch, 0, 1000)
    assert next(batches)[0] == 0
    batches.close()
    assert threading.active_count() <= before + 1


class Broken(Still):
    """Its batch of a step cannot be made."""

    def __init__(self, bad_step):
        self.bad_step = bad_step

    def batches(self, step):
        if step == self.bad_step:
            raise OSError("shard 3\nis gone")
        return super().batches(step)


def test_a_batch_that_cannot_be_made_costs_no_step(tmp_path):
    config = dataclasses.replace(CONFIG, num_steps=6, checkpoint_every=6)
    whole = train(Still(), config, tmp_path / "whole", progress=False)
    with pytest.raises(DataError, match="batch of step 3 cannot be made: shard 3 is gone"):
        train(Broken(3), config, tmp_path / "cut", progress=False)
    state = train(Still(), config, tmp_path / "cut", progress=False)
    assert [row["first_step"] for row in read(tmp_path / "cut" / "runs.jsonl")] == [0, 3]
    for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(whole), strict=True):
        np.testing.assert_array_equal(a, b)


def test_settings_that_cannot_be_kept_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"loop\.workers=-1: expected a number of processes"):
        LoopConfig(num_steps=1, warmup_steps=0, workers=-1)
    task = Still()
    lock = threading.Lock()
    task.batches = lambda step: {"x": lock}
    with pytest.raises(ValueError, match=r"loop\.workers=2: .* set loop\.workers=0"):
        train(task, dataclasses.replace(CONFIG, workers=2), tmp_path, progress=False)

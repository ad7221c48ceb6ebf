"""The command line of training, in this process; the chain of all stages by their commands."""

import dataclasses
import json
import os
import subprocess
import sys
import types
from pathlib import Path

import jax
import pytest
from absl import flags

from benchmarks.loader import write_noise
from jax_avatar.evaluation import in_training
from jax_avatar.io.video import read_video
from jax_avatar.planning.training import plan_run
from launch import cli, train
from launch.overrides import read_config, split_arguments
from tests.training.run.test_loop import CONFIG, LineTask

ROOT = Path(__file__).parents[2]


def parse(*argv):
    file, overrides, others = split_arguments(argv)
    return read_config(file, overrides), others


def test_settings_are_overridden_whether_the_file_names_them_or_not():
    settings, others = parse(
        "--config=configs/dmd.py:tiny", "--workdir", "runs/x", "--config.loop.num_steps=7",
        "--config.task.generator_every", "3", "--config.task.normalizer=block",
        "--config.task.sigma_bounds=[0.1,0.9]", "--config.seed=4", "--dry_run",
    )  # fmt: skip
    assert others == ["--workdir", "runs/x", "--dry_run"]
    assert settings["loop"]["num_steps"] == 7 and settings["seed"] == 4
    changed = {"generator_every": 3, "normalizer": "block", "sigma_bounds": [0.1, 0.9]}
    assert settings["task"].items() >= changed.items()


def test_an_evaluation_streams_as_many_clips_as_told(monkeypatch):
    task = LineTask()
    task.streamed = object()  # a transformer
    monkeypatch.setattr(in_training, "make_evaluation", lambda *args, num_clips: num_clips)
    monkeypatch.setattr(train, "WORKDIR", types.SimpleNamespace(value="runs"))
    loop = dataclasses.replace(CONFIG, evaluate_every=4, evaluate_clips=5)
    assert train.evaluations_of(task, {}, loop) == [5]
    assert train.evaluations_of(task, {}, CONFIG) == []


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--config.lop.num_steps=3", r"config\.lop is not in this config.*'loop'"),
        ("--config.loop=3", r"--config\.loop: expected --config\.loop\.SETTING="),
        ("--config.seed.x=3", r"--config\.seed\.x: expected --config\.seed="),
        ("--config=configs/dmb.py", r"configs/dmb\.py is no file.*perhaps configs/dmd\.py"),
        ("--config.loop.num_steps", r"without a value"),
    ],
)
def test_a_mistake_on_the_command_line_is_named(argument, message, monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises(ValueError, match=message):
        parse("--config=configs/dmd.py:tiny", argument)


def test_the_plan_of_the_published_size_needs_neither_data_nor_weights():
    settings, _ = parse("--config=configs/dmd.py:wan_s2v_14b")
    lines = "\n".join(plan_run(settings))
    assert "1000, 937.5, 833.333, 625" in lines and "generator updates: 500" in lines
    assert "16,271,819,609 weights" in lines
    # One frozen base in bfloat16, and 676 million weights of each adapter in float32.
    rows = {tuple(line.split()) for line in lines.splitlines()}
    assert ("frozen", "base", "30.31", "GiB", "computed") in rows
    assert ("generator", "and", "critic", "5.04", "GiB", "computed") in rows
    assert ("averaged", "generator", "2.52", "GiB", "computed") in rows
    assert "not compiled" in lines


def run(*arguments, script="train"):
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_COMPILATION_CACHE_DIR": ".jax_cache"}
    environment.pop("XLA_FLAGS", None)  # one device, as users have
    command = [sys.executable, f"launch/{script}.py", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


@pytest.fixture
def compiled():
    """Where compiled programs were kept before; set back afterwards."""
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = {name: getattr(jax.config, name) for name in names}
    yield
    for name, value in before.items():
        jax.config.update(name, value)


def test_training_keeps_what_it_compiles(tmp_path, monkeypatch, compiled):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "kept"))
    flags.FLAGS(["train.py", "--config=nowhere.py"])
    assert cli.exit_code(lambda: train.run({})) == 2
    assert jax.config.jax_compilation_cache_dir == str(tmp_path / "kept")
    assert jax.config.jax_persistent_cache_min_compile_time_secs < 1


def test_a_missing_shard_is_one_line_and_leaves_the_run_alone(
    tmp_path, monkeypatch, capsys, compiled
):
    monkeypatch.chdir(ROOT)
    write_noise(tmp_path / "data", "small", 2)
    (shard,) = (tmp_path / "data").glob("*.array_record")
    shard.unlink()
    file, changes, others = split_arguments(
        ["train.py", "--config=configs/teacher.py:tiny", f"--config.latents={tmp_path / 'data'}"]
    )
    flags.FLAGS([*others, f"--config={file}", f"--workdir={tmp_path / 'run'}"])
    assert cli.exit_code(lambda: train.run(changes)) == 2
    said = capsys.readouterr().err
    assert f"shard {shard} is missing" in said and said.count("\n") == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_mistakes_are_one_line_and_a_run_is_not_overwritten(tmp_path):
    (tmp_path / "metrics.jsonl").write_text("")
    tiny, workdir = "--config=configs/teacher.py:tiny", f"--workdir={tmp_path}"
    for arguments, message in [
        ([tiny, workdir, "--noresume"], "is not empty, and nothing is overwritten"),
        ([tiny, workdir, "--config.task.shfit=3"], "did you mean 'shift'?"),
        ([tiny], "--workdir is missing"),
        ([workdir], "is no file"),
    ]:
        made = run(*arguments)
        assert made.returncode == 2 and message in made.stderr
        assert made.stderr.startswith("error: ") and made.stderr.count("\n") == 1


@pytest.mark.slow
def test_all_stages_run_from_nothing_to_a_stream(tmp_path):
    vae, teacher, causal, student = (tmp_path / n for n in ("vae", "teacher", "causal", "student"))
    weights = {
        "vae": (vae, {}),
        "teacher": (teacher, {"vae": vae}),
        "diffusion_forcing": (causal, {"vae": vae, "start": teacher}),
        "dmd": (student, {"model": causal, "teacher": teacher, "student": causal}),
    }
    for stage, (workdir, folders) in weights.items():
        given = [f"--config.weights.{name}={folder}" for name, folder in folders.items()]
        made = run(f"--config=configs/{stage}.py:tiny", f"--workdir={workdir}", *given)
        assert made.returncode == 0, made.stderr[-2000:]
        metrics = [json.loads(line) for line in (workdir / "metrics.jsonl").open()]
        assert metrics[-1]["step"] == 20
        if stage != "vae":
            assert any("eval/lip_r" in line for line in metrics)
            videos = sorted((workdir / "samples" / "step_000020").glob("*.mp4"))
            assert len(videos) == 3
    out = tmp_path / "avatar.mp4"
    made = run(
        f"--checkpoint={student}", "--mesh=1", "--duration=1", f"--out={out}", script="stream"
    )
    assert made.returncode == 0, made.stderr[-2000:]
    assert read_video(out)[0].shape == (16, 96, 96, 3)

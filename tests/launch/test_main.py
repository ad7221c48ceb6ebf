"""The command `jax-avatar`, from here and from a wheel without the checkout."""

import runpy
import shutil
import subprocess
import sys
import sysconfig
import tomllib
from pathlib import Path

import pytest

from launch import main

ROOT = Path(__file__).parents[2]


def test_the_command_runs_a_module_with_its_flags(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["jax-avatar", "inspect", "--help"])
    with pytest.raises(SystemExit) as ended:
        main.main()
    assert (
        ended.value.code == 0 and "usage: python -m conversion.inspect" in capsys.readouterr().out
    )
    asked = []
    monkeypatch.setattr(runpy, "run_module", lambda name, **_: asked.append((name, sys.argv[1:])))
    monkeypatch.setattr(sys, "argv", ["jax-avatar", "prepare-data", "stats", "data"])
    main.main()
    assert asked == [("launch.prepare_data", ["stats", "data"])]


def test_all_commands_are_listed_and_exist(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["jax-avatar", "--help"])
    main.main()
    told = capsys.readouterr().out
    for name, (module, text) in main.COMMANDS.items():
        assert f"  {name} " in told and text in told
        assert (ROOT / f"{module.replace('.', '/')}.py").is_file()
    no_commands = {"__init__", "cli", "common", "hosts", "main", "overrides"}
    files = {path.stem for path in (ROOT / "launch").glob("*.py")} - no_commands
    assert files <= {module.split(".")[1] for module, _ in main.COMMANDS.values()}


@pytest.mark.parametrize("argv", [[], ["strem"]])
def test_another_command_is_one_line(monkeypatch, capsys, argv):
    monkeypatch.setattr(sys, "argv", ["jax-avatar", *argv])
    with pytest.raises(SystemExit) as ended:
        main.main()
    told = capsys.readouterr().err
    assert ended.value.code == 2 and told.count("\n") == 1 and "expected one of stream," in told


@pytest.mark.slow
def test_a_wheel_is_enough(tmp_path):
    def run(*command):
        done = subprocess.run(
            list(map(str, command)), capture_output=True, text=True, cwd=tmp_path, timeout=500
        )
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout

    source = tmp_path / "source"  # the build leaves its folders there
    for part in ("jax_avatar", "conversion", "configs", "launch"):
        shutil.copytree(ROOT / part, source / part)
    for name in ("pyproject.toml", "README.md", "LICENSE", "NOTICE"):
        shutil.copy(ROOT / name, source)
    run(sys.executable, "-m", "pip", "wheel", "--no-deps", "-w", tmp_path / "wheels", source)
    (wheel,) = (tmp_path / "wheels").glob("*.whl")
    run(sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv")
    python = tmp_path / "venv" / "bin" / "python"
    run(sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", wheel)
    # The dependencies as they are here; what the wheel installed comes before them.
    (folder,) = (tmp_path / "venv" / "lib").glob("*/site-packages")
    here = {sysconfig.get_paths()["purelib"], str(Path(pytest.__file__).parents[1])}
    (folder / "here.pth").write_text("\n".join(here))
    where = run(python, "-c", "import launch.main as m; print(m.__file__)")
    assert where.startswith(str(tmp_path))
    command = tmp_path / "venv" / "bin" / "jax-avatar"
    assert "prepare-data" in run(command, "--help")
    assert "--checkpoint" in run(command, "stream", "--help")
    assert "--helpfull" in run(command, "train", "--help")
    # A config of the package, without the checkout.
    run(command, "train", "--config=configs/teacher.py:tiny", "--dry_run", "--workdir=x")
    with (ROOT / "pyproject.toml").open("rb") as file:
        assert tomllib.load(file)["project"]["scripts"] == {"jax-avatar": "launch.main:main"}

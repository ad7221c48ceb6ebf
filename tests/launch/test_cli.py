"""The scaffold of every command: pipes, flags, sizes, devices, exit codes."""

import argparse
import errno
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from absl import flags

from jax_avatar.models.vae.light import LightVAEConfig
from jax_avatar.testing import ANCHORED
from jax_avatar.weights.files import save_weights
from jax_avatar.weights.settings import StreamSettings
from launch import cli
from launch.cli import check_finite, finite, outlive_readers, refuse_input_as_output
from launch.common import frame_size, keep_compiled
from launch.overrides import read_config


def test_a_command_outlives_the_reader_of_its_output(monkeypatch):
    reader, writer = os.pipe()
    with open(writer, "w") as pipe:
        monkeypatch.setattr(sys, "stdout", pipe)
        outlive_readers()
        outlive_readers()
        print("first", flush=True)
        assert os.read(reader, 100) == b"first\n"
        os.close(reader)
        for _ in range(3):
            print("x" * 100_000)
            sys.stdout.flush()
        assert sys.stdout.fileno() == writer and not sys.stdout.isatty()


def test_flags_that_are_no_numbers_are_refused():
    values = flags.FlagValues()
    flags.DEFINE_float("rate", 1.0, "", flag_values=values)
    flags.DEFINE_string("name", "nan", "", flag_values=values)
    values(["command"])
    check_finite(values)
    for text in ("inf", "nan", "-inf"):
        values(["command", f"--rate={text}"])
        with pytest.raises(ValueError, match=f"--rate {text}: expected a finite number"):
            check_finite(values)
    assert finite("-1e3") == -1000
    with pytest.raises(argparse.ArgumentTypeError, match="nan: expected a finite number"):
        finite("nan")


@pytest.mark.parametrize("text", ["nan", "inf", "-Infinity", "1e999"])
def test_settings_that_are_no_numbers_are_refused(text):
    with pytest.raises(ValueError, match=rf"--config\.optimiser\.learning_rate={text}: expected a"):
        read_config("configs/teacher.py:tiny", {"optimiser.learning_rate": text})


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (AssertionError(), "JAX finds no such device; install"),
        (RuntimeError("Unable:\nno chip (set JAX_PLATFORMS='')"), "device (Unable: no chip);"),
    ],
)
def test_a_device_that_is_absent_gets_one_line(monkeypatch, capsys, error, reason):
    def devices():
        raise error

    monkeypatch.setattr(jax, "devices", devices)
    with pytest.raises(SystemExit) as ended:
        cli.exit_code(jax.devices)  # as a command that did not look before
    said = capsys.readouterr().err
    assert ended.value.code == 2 and said.count("\n") == 1 and said.startswith("error: JAX_PLATF")
    assert reason in said


def test_an_output_that_is_an_input_is_refused_by_whatever_name(tmp_path, monkeypatch):
    folder = tmp_path / "data"
    folder.mkdir()
    source = folder / "a.mp4"
    source.write_bytes(b"x")
    (tmp_path / "soft").symlink_to(source)
    os.link(source, tmp_path / "hard")
    monkeypatch.chdir(tmp_path)
    for name in (source, "data/a.mp4", "data/../data/a.mp4", "soft", "hard"):
        with pytest.raises(ValueError, match="is what --audio reads"):
            refuse_input_as_output("out", name, audio=source)
        refuse_input_as_output("out", name, audio=tmp_path / "other", image=None)
        refuse_input_as_output("out", name, audio="x" * 300)  # no file can be called so
    with pytest.raises(ValueError, match="lies in what --data reads"):
        refuse_input_as_output("out", folder / "new" / "b.mp4", data=folder)
    with open(source, "rb") as file:
        monkeypatch.setattr(sys, "stdin", file)
        for name in ("-", "/dev/stdin"):
            with pytest.raises(ValueError, match="is what --audio reads"):
                refuse_input_as_output("out", "soft", audio=name)
        refuse_input_as_output("out", "new.mp4", audio="-")


@pytest.mark.parametrize(
    "command",
    [
        "benchmarks/stream.py --nano --mesh 1",
        "benchmarks/vae_decode.py --tiny",
        "-m conversion.verify tests/golden",
    ],
)
@pytest.mark.slow
def test_a_gpu_that_is_absent_gets_one_line(command):
    done = subprocess.run(
        [sys.executable, *command.split()],
        cwd=Path(__file__).parents[2],
        env=os.environ | {"JAX_PLATFORMS": "cuda", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=300,
    )
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    assert len(errors) == 1 and "JAX_PLATFORMS=cuda: JAX finds no such device" in errors[0]


@pytest.mark.parametrize(
    ("outcome", "code", "line"),
    [
        (None, 0, ""),
        ({"a": "record"}, 0, ""),
        (1, 1, ""),
        (ValueError("x 3: expected 4."), 2, "error: x 3: expected 4."),
        (FileNotFoundError(errno.ENOENT, "No such file", "a"), 2, "error: [Errno 2] No such fi"),
        (OSError(errno.ENOSPC, "No space left"), 1, "error: [Errno 28] No space left; repeat it."),
        (OSError("a cannot be written."), 1, "error: a cannot be written; repeat it."),
        (ConnectionResetError("gone"), 1, "error: gone; repeat it."),
        (KeyboardInterrupt(), 130, "stopped; repeat it."),
    ],
)
def test_a_command_ends_with_one_line_and_one_of_four_codes(outcome, code, line, capsys):
    def command():
        if isinstance(outcome, BaseException):
            raise outcome
        return outcome

    assert cli.exit_code(command, hint="repeat it") == code
    said = capsys.readouterr().err
    assert said.startswith(line) and said.count("\n") == bool(line)


def test_a_mistake_of_ours_stays_a_traceback():
    with pytest.raises(AssertionError, match="a mistake"):
        cli.exit_code(lambda: (_ for _ in ()).throw(AssertionError("a mistake")))


@pytest.mark.parametrize(
    ("argv", "code", "line"),
    [
        (["--rate=3", "in"], 0, ""),
        (["--help"], 0, ""),
        (["--rate=x", "in"], 2, "error: flag --rate=x: "),
        (["--rte=3", "in"], 2, "error: Unknown command line flag 'rte'"),
        ([], 2, "error: [] not understood; expected FILE, see --help."),
        (["in", "out"], 2, "error: ['in', 'out'] not understood; expected FILE"),
    ],
)
def test_flags_that_are_not_understood_are_one_line(argv, code, line):
    text = (
        "from absl import flags\nfrom launch import cli\n"
        "flags.DEFINE_float('rate', 1.0, 'of it')\n"
        "cli.run_with_flags(lambda file: None, names=['FILE'])"
    )
    done = subprocess.run([sys.executable, "-c", text, *argv], capture_output=True, text=True)
    assert done.returncode == code and done.stderr.startswith(line), done.stderr
    assert done.stderr.count("\n") == bool(line) and ("--rate" in done.stdout) == (
        argv == ["--help"]
    )


def test_arguments_that_are_not_understood_are_one_line(capsys):
    parser = cli.Parser()
    parser.add_argument("--count", type=int, default=3, help="of them")
    assert "(default: 3)" in parser.format_help()
    with pytest.raises(SystemExit) as ended:
        parser.parse_args(["--count=x"])
    assert ended.value.code == 2
    assert capsys.readouterr().err == (
        "error: argument --count: invalid int value: 'x'; see --help.\n"
    )


@pytest.mark.parametrize(
    ("size", "pixels"),
    [
        ("704*384", (704, 384)),
        (["704*384"], (704, 384)),
        # Until the next release:
        ("704x384", (704, 384)),
        (["704", "384"], (704, 384)),
        ("96", (96, 96)),
    ],
)
def test_sizes_in_every_spelling_mean_the_same(size, pixels, capsys):
    assert cli.parse_size(size) == pixels
    said = capsys.readouterr().err
    is_new = "*" in "".join(size)
    height, width = pixels
    assert not said if is_new else said.endswith(f"write --size {height}*{width}.\n")


@pytest.mark.parametrize("size", ["0*0", "-64*-64", "64*nan", "64*64*3", "64 * 64", "9" * 5000])
def test_sizes_that_are_none_are_refused(size):
    class AnySize:
        max_area, size, multiple = 64 * 64, None, 64

    with pytest.raises(ValueError, match=r"expected HEIGHT\*WIDTH"):
        frame_size("", AnySize, (64, 64, 3), size)


@pytest.mark.parametrize("vae", [ANCHORED, LightVAEConfig()], ids=["anchored", "light"])
def test_a_model_makes_all_sizes_that_have_its_latents(vae, tmp_path):
    save_weights(tmp_path, "vae", {"w": np.zeros(1, np.float32)}, vae.to_dict())
    settings = StreamSettings(fps=25, size=(128, 128), sigmas=(1.0, 0.0))

    def size(asked):
        return frame_size(tmp_path, settings, (64, 96, 3), asked)

    assert size(None) == size("128*128") == (128, 128)
    with pytest.raises(ValueError, match=r"--size: 90\*90 pixels: .*(128|multiples of 16)"):
        size("90*90")
    if vae is ANCHORED:
        assert size("192*192") == (192, 192)
        return
    with pytest.raises(ValueError, match=r"192\*192: this model makes 128\*128 only"):
        size("192*192")


def test_a_cache_that_cannot_be_written_is_none(tmp_path, monkeypatch):
    told = {}
    monkeypatch.setattr(jax.config, "update", told.__setitem__)
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "cache"))
    keep_compiled()
    assert told["jax_compilation_cache_dir"] == str(tmp_path / "cache")
    (tmp_path / "file").touch()
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "file" / "cache"))
    told.clear()
    keep_compiled()
    assert not told

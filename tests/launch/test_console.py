"""What every command does at its console, and with what it may not write or use."""

import argparse
import os
import sys

import jax
import pytest
from absl import flags

from launch.common import check_devices, frame_size, keep_compiled, refuse_input_as_output
from launch.console import check_finite, finite, outlive_readers
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
        check_devices()
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


@pytest.mark.parametrize("size", ["0*0", "-64*-64", "64*nan", "64x64", "64"])
def test_sizes_that_are_none_are_refused(size):
    class AnySize:
        max_area, size, multiple = 64 * 64, None, 64

    with pytest.raises(ValueError, match=r"expected HEIGHT\*WIDTH"):
        frame_size(AnySize, (64, 64, 3), size)


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

"""Scaffold of every command: flags that mean the same everywhere, one line an error, exit codes.

0    done
1    a check or a run failed: out of tolerance, training that diverged, a full disk
2    bad input or usage, a device or a package that is missing
130  interrupted (Ctrl-C), as shells report it
"""

import argparse
import contextlib
import errno
import math
import os
import re
import signal
import stat
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

from absl import app, flags

__all__ = [
    "BAD_INPUT",
    "CHECKPOINT",
    "DONE",
    "DTYPE",
    "FAILED",
    "INTERRUPTED",
    "MESH",
    "SIZE",
    "Parser",
    "check_devices",
    "check_finite",
    "end_by_sigterm",
    "exit_code",
    "finite",
    "needs_extra",
    "outlive_readers",
    "parse_size",
    "refuse_input_as_output",
    "run",
    "run_with_flags",
    "say",
    "warn",
]

DONE, FAILED, BAD_INPUT, INTERRUPTED = 0, 1, 2, 130

MESH = "slices: 5 = 4 denoising + VAE, 1 = one device, 4x2+1, ..."
CHECKPOINT = "model folder"
DTYPE = "of the large products' weights: int8 or fp8 rounds them"
SIZE = "HEIGHT*WIDTH in pixels"
STREAM_SIZE = (
    f"{SIZE}; the model's if not given. With a VAE anchored in the portrait any square from "
    "128*128 on; only the area counts for models of any shape"
)
FACE = "of the picture, counted from 1 from left to right; the largest if not given"
FRAME = "crop: the square around the face; full: the picture in which it moves"

# What the system refuses although the input is right.
_FAILURES = {errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EFBIG, errno.ENOMEM}


def say(text: str) -> None:
    """Prints a line on standard error."""
    print(text, file=sys.stderr, flush=True)


def warn(text: str) -> None:
    """Prints a warning on standard error."""
    say(f"warning: {text}")


def run(command: Callable[[], Any], *, hint: str = "") -> NoReturn:
    """Runs a command and exits, as `exit_code` says."""
    sys.exit(exit_code(command, hint=hint))


def run_with_flags(
    command: Callable[..., Any],
    *,
    argv: Sequence[str] | None = None,
    names: Sequence[str] = (),
    hint: str = "",
) -> NoReturn:
    """Parses absl's flags, runs a command and exits, as `exit_code` says.

    Args:
        command: called with the arguments that are no flags.
        argv: program and arguments; those of the process if not given.
        names: of the arguments that are no flags.
        hint: what to do, or what is left, after Ctrl-C or a failure.
    """

    def parse(argv: Sequence[str]) -> list[str]:
        try:
            rest = flags.FLAGS(argv)
        except SystemExit:
            sys.exit(DONE)  # absl ends --help with 1
        except flags.Error as error:
            say(f"error: {error}; see --help.")
            sys.exit(BAD_INPUT)
        if len(rest) != 1 + len(names):
            expected = f"expected {' '.join(names)}" if names else "every argument is a --flag"
            say(f"error: {rest[1:]} not understood; {expected}, see --help.")
            sys.exit(BAD_INPUT)
        return rest

    def main(rest: Sequence[str]) -> int:
        return exit_code(lambda: command(*rest[1:]), hint=hint)

    app.run(main, argv=argv, flags_parser=parse)


def exit_code(command: Callable[[], Any], *, hint: str = "") -> int:
    """Runs a command; an error of its input, its device or the system becomes one line.

    Args:
        command: returns its exit code, or anything else if it is done.
        hint: what to do, or what is left, after Ctrl-C or a failure.
    """
    outlive_readers()
    try:
        code = command()
    except (ValueError, OSError) as error:
        if not _is_failure(error):
            say(f"error: {error}")
            return BAD_INPUT
        say(f"error: {str(error).removesuffix('.')}; {hint}." if hint else f"error: {error}")
        return FAILED
    except KeyboardInterrupt:
        say(f"stopped; {hint}." if hint else "stopped")
        return INTERRUPTED
    except (RuntimeError, AssertionError):  # as JAX tells of a device that is not there
        check_devices()
        raise
    return code if isinstance(code, int) else DONE


def _is_failure(error: ValueError | OSError) -> bool:
    """True if the system failed, not the input; a failed write of ours has no number."""
    if isinstance(error, ConnectionError) or (type(error) is OSError and error.errno is None):
        return True
    return isinstance(error, OSError) and error.errno in _FAILURES


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line, and whose help names the defaults."""

    def __init__(self, **options: Any):
        options.setdefault("formatter_class", argparse.ArgumentDefaultsHelpFormatter)
        super().__init__(**options)

    def error(self, message: str) -> NoReturn:
        """Exits with one line."""
        say(f"error: {message.removesuffix('.')}; see --help.")
        sys.exit(BAD_INPUT)


@contextlib.contextmanager
def needs_extra(extra: str) -> Iterator[None]:
    """Ends the command with one line where a package of an extra is missing."""
    try:
        yield
    except ModuleNotFoundError as missing:
        say(f'error: {missing.name} is not installed; install it: pip install ".[{extra}]"')
        sys.exit(BAD_INPUT)


def check_devices() -> None:
    """Ends the command with one line where JAX lacks the devices that JAX_PLATFORMS names.

    Several hosts are joined before this, if they are to be.
    """
    import jax

    try:
        jax.devices()
    except (RuntimeError, AssertionError) as error:  # the latter where CUDA's part is missing
        asked = jax.config.jax_platforms or "any"
        reason = " ".join(str(error).split(" (set JAX_PLATFORMS")[0].split())
        say(
            f"error: JAX_PLATFORMS={asked}: JAX finds no such device"
            + (f" ({reason})" if reason else "")
            + '; install its part of JAX (pip install ".[cuda]" or ".[tpu]"), or set '
            "JAX_PLATFORMS=cpu."
        )
        sys.exit(BAD_INPUT)


def end_by_sigterm() -> None:
    """Lets SIGTERM end the command as Ctrl-C does."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)


def parse_size(size: str | Sequence[str], flag: str = "--size") -> tuple[int, int]:
    """Height and width of `--size HEIGHT*WIDTH`.

    HEIGHTxWIDTH, `HEIGHT WIDTH` and one number, the edge of a square, are accepted for one more
    release.

    Args:
        size: as written, or the words of it.
        flag: name of the flag.

    Raises:
        ValueError: it is none of them, or a side is 0.
    """
    text = size if isinstance(size, str) else " ".join(size)
    match = re.fullmatch(r"(\d{1,6})(?:([*x ])(\d{1,6}))?", text.strip(), re.ASCII)
    height, width = (int(match[1]), int(match[3] or match[1])) if match else (0, 0)
    if not (height and width):
        raise ValueError(f"{flag} {text}: expected HEIGHT*WIDTH, for example 704*384.")
    if match[2] != "*":
        warn(f"{flag} {text} will not be read by the next release; write {flag} {height}*{width}.")
    return height, width


def refuse_input_as_output(flag: str, out: str | Path, **inputs: str | Path | None) -> None:
    """Refuses an output that would take the place of an input.

    Args:
        flag: name of the output's flag.
        out: file or folder to write.
        **inputs: flag -> file or folder to read; "-" is standard input.

    Raises:
        ValueError: it is one of them, by whatever name or link, or lies in such a folder.
    """
    written = Path(os.path.realpath(out))
    for name, path in inputs.items():
        if not path:
            continue
        is_piped = str(path) in ("-", "/dev/stdin")
        read = Path(os.path.realpath(path))
        is_same = written == read
        with contextlib.suppress(OSError, ValueError):  # one of them is not there, or is no file
            came = os.fstat(sys.stdin.fileno()) if is_piped else read.stat()
            is_same |= os.path.samestat(came, written.stat()) and not stat.S_ISCHR(came.st_mode)
        if is_same or (os.path.isdir(read) and read in written.parents):
            where = "is" if is_same else "lies in"
            raise ValueError(
                f"--{flag} {out} {where} what --{name} reads, which is not overwritten; give "
                "another name."
            )


def check_finite(flags: Any) -> None:
    """Refuses NaN and infinity.

    Args:
        flags: absl's `FLAGS`, parsed.

    Raises:
        ValueError: a flag is infinite or NaN.
    """
    for name in flags:
        value = flags[name].value
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"--{name} {value}: expected a finite number.")


def finite(text: str) -> float:
    """A number for argparse, neither infinite nor NaN."""
    value = float(text)
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"{text}: expected a finite number")
    return value


class _Outlives:
    """A text stream whose reader may leave: what is written after that is dropped."""

    def __init__(self, stream: Any):
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        with self._left_alone():
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with self._left_alone():
            self._stream.flush()

    @contextlib.contextmanager
    def _left_alone(self):
        try:
            yield
        except BrokenPipeError:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)


def outlive_readers() -> None:
    """Lets the command finish its work where the reader of its output leaves (`... | head -1`)."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if not isinstance(stream, _Outlives):
            setattr(sys, name, _Outlives(stream))

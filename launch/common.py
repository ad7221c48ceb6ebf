"""Preparation that several commands share."""

import contextlib
import logging
import os
import stat
import sys
from pathlib import Path

import jax
from absl import logging as absl_logging

from jax_avatar.io.image import fit_size


def prepare_jax(num_devices: int) -> None:
    """Gives a CPU that many devices (others do not look at it), and keeps what is compiled."""
    jax.config.update("jax_num_cpu_devices", num_devices)
    keep_compiled()
    check_devices()


def keep_compiled() -> None:
    """Keeps compiled programs on disk: in `JAX_COMPILATION_CACHE_DIR`, or in the home folder.

    Where neither can be written, every start compiles again.
    """
    try:
        cache = os.environ.get("JAX_COMPILATION_CACHE_DIR", "~/.cache/jax_avatar")
        folder = Path(cache).expanduser()
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError):  # the latter where there is no home
        return
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)


def check_devices() -> None:
    """Ends the command with one line and code 2 where JAX lacks the devices it was told to use.

    Several hosts are joined before this, if they are to be.
    """
    try:
        jax.devices()
    except (RuntimeError, AssertionError) as error:  # the latter where CUDA's part is missing
        asked = jax.config.jax_platforms or "any"
        reason = " ".join(str(error).split(" (set JAX_PLATFORMS")[0].split())
        print(
            f"error: JAX_PLATFORMS={asked}: JAX finds no such device"
            + (f" ({reason})" if reason else "")
            + '; install its part of JAX (pip install ".[cuda]" or ".[tpu]"), or set '
            "JAX_PLATFORMS=cpu.",
            file=sys.stderr,
            flush=True,
        )
        sys.exit(2)


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


def log_warnings() -> None:
    """Warnings and errors go to standard error, one line each; the rest is dropped."""
    absl_logging.set_verbosity(absl_logging.WARNING)  # Orbax tells of every restore
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")


def frame_size(settings, image_shape, asked: str | None) -> tuple[int, int]:
    """Pixel height and width of the stream."""
    area = settings.max_area
    if asked:
        try:
            height, width = (int(side) for side in asked.split("*"))
            if min(height, width) < 1:
                raise ValueError
            area = height * width
        except ValueError:
            raise ValueError(
                f"--size {asked}: expected HEIGHT*WIDTH, for example 704*384."
            ) from None
        if settings.size and (height, width) != settings.size:
            raise ValueError(
                f"--size {asked}: this model makes {settings.size[0]}*{settings.size[1]} only; "
                "leave --size out."
            )
    return settings.size or fit_size(*image_shape[:2], area, settings.multiple)

"""What several commands do before they begin."""

import logging
import os
from pathlib import Path

import jax
from absl import logging as absl_logging

from jax_avatar.io.image import fit_size


def prepare_jax(num_devices: int) -> None:
    """Gives a CPU that many devices (others do not look at it), and keeps what is compiled."""
    jax.config.update("jax_num_cpu_devices", num_devices)
    keep_compiled()


def keep_compiled() -> None:
    """Keeps compiled programs on disk: in `JAX_COMPILATION_CACHE_DIR`, or in the home folder."""
    cache = os.environ.get("JAX_COMPILATION_CACHE_DIR", "~/.cache/jax_avatar")
    jax.config.update("jax_compilation_cache_dir", str(Path(cache).expanduser()))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)


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

"""Preparation of JAX and of the portrait that several commands share."""

import logging
import os
from pathlib import Path

import jax
import numpy as np
from absl import logging as absl_logging

from jax_avatar.io.image import fit_size
from jax_avatar.portraits.view import PortraitView, ShownPortrait
from jax_avatar.weights.networks import network_config
from jax_avatar.weights.settings import StreamSettings
from launch.cli import check_devices, parse_size, warn

_ANY_SQUARE = (4096, 4096)  # pixels of a picture that leaves the size of the stream to the model


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


def log_warnings() -> None:
    """Warnings and errors go to standard error, one line each; the rest is dropped."""
    absl_logging.set_verbosity(absl_logging.WARNING)  # Orbax tells of every restore
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")


def frame_size(
    checkpoint: str, settings: StreamSettings, image_shape: tuple[int, ...], asked: str | None
) -> tuple[int, int]:
    """Pixel height and width of the stream.

    A model that is made for a size makes all sizes that have the same latents.

    Args:
        checkpoint: the model's folder.
        settings: of its stream.
        image_shape: of the portrait's file, which decides where the model leaves the size free.
        asked: --size, or None.

    Raises:
        ValueError: `asked` is no size, or none that the model makes.
    """
    if not asked:
        free = settings.max_area, settings.multiple
        return settings.size or fit_size(*image_shape[:2], *free)
    height, width = parse_size(asked)
    if not settings.size:
        return fit_size(*image_shape[:2], height * width, settings.multiple)
    vae = network_config(checkpoint, "vae")
    try:
        if vae.latent_grid(height, width) == vae.latent_grid(*settings.size):
            return height, width
    except ValueError as error:
        raise ValueError(f"--size: {error}") from None
    raise ValueError(
        f"--size {asked}: this model makes {settings.size[0]}*{settings.size[1]} only; leave "
        "--size out."
    )


def prepare_portrait(
    path: str,
    image: np.ndarray,
    checkpoint: str,
    settings: StreamSettings,
    asked: str | None,
    *,
    cover: bool = True,
    face: int | None = None,
    frame: str = "crop",
) -> ShownPortrait:
    """The portrait in the size of the stream; warns of what is to be expected of it.

    Args:
        path: of the image, for messages.
        image: `H W 3`, 8 bits.
        checkpoint: as `settings` and `asked`, see `frame_size`.
        settings: of the stream.
        asked: --size, or None.
        cover: as `face` and `frame`, see `PortraitView`.
        face: number of the face.
        frame: "crop" or "full".

    Raises:
        ValueError: the size is not for this model, or a face decides and cannot be found.
    """
    view = PortraitView(settings.framing, face, frame)
    shape = _ANY_SQUARE if settings.framing == "face" else image.shape
    size = frame_size(checkpoint, settings, shape, asked)
    shown = view.portrait(image, size, cover=cover, name=path)
    for remark in shown.remarks:
        warn(remark)
    return shown

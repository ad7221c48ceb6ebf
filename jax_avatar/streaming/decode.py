"""Latents -> pixels, piece by piece: the VAE's decoder behind a stream, which is not waited for."""

import functools
from collections import deque
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import UInt8

from jax_avatar.models.network import Network
from jax_avatar.models.sharding import put_on
from jax_avatar.pixels import to_uint8
from jax_avatar.shapes import Array, Latent
from jax_avatar.weights.folder import AvatarModel

__all__ = ["Decoder", "NotFinite", "make_decode"]


class NotFinite(ValueError):
    """The networks' output is NaN or infinity, which would be a black video."""


def make_decode(vae: Network) -> tuple[Callable, Callable]:
    """The compiled decoder of a VAE: latents -> uint8 pixels, with the state of the stream.

    Streams of one VAE share it.

    Args:
        vae: structure and size of the video autoencoder; weights are left aside.

    Returns:
        `(params, portraits, latents) -> (error, state)` of the first latents, the RMS of what they
        show against the portraits, and `(params, state, latents) -> (pixels, is_finite, state)` of
        all others; the state is donated. `is_finite` is False where the pixels would be NaN or
        infinity, which are black.
    """
    return _compiled(vae.without_params())


@functools.lru_cache(maxsize=16)
def _compiled(bare: Network) -> tuple[Callable, Callable]:
    def start(params, portraits, latents):
        shown, state = bare.bind(params).start(portraits, latents)
        error = jnp.sqrt(jnp.mean((jnp.clip(shown, -1, 1) - portraits) ** 2))
        return error, state

    def following(params, state, latents):
        video, state = bare.bind(params).decode_next(state, latents)
        video = video.astype(jnp.float32)
        return to_uint8(video), jnp.isfinite(video).all(), state

    return jax.jit(start), jax.jit(following, donate_argnums=1)


class Decoder:
    """Decoder of one stream: takes latents as they are promised, gives pixels when asked.

    Attributes:
        params: of the VAE, where it runs.
        portrait_error: RMS of the portraits as decoded, in pixels within [-1, 1]; not waited for.
        decoded: pieces handed to the device since the start.
        fetched: pieces of them that were fetched.
    """

    def __init__(self, model: AvatarModel, place: Any):
        """Places the weights.

        Args:
            model: to stream.
            place: device or sharding of the VAE's weights.
        """
        self.model, self.params = model, put_on(model.vae.params, place)
        self._start, self._next = make_decode(model.vae)

    def start(self, portraits: Array | np.ndarray, still: Latent | np.ndarray) -> None:
        """Begins anew, after latents of still portraits; pieces under way are dropped.

        Args:
            portraits: `b 1 H W 3`, in [-1, 1], where the decoder runs.
            still: their latents, decoded before the stream, there too.
        """
        self.portrait_error, self.state = self._start(self.params, portraits, still[:, :1])
        if still.shape[1] > 1:
            self.decode(still[:, 1:])
        self._pending: deque[tuple[Array, Array]] = deque()
        self.decoded = self.fetched = 0

    def decode(self, latents: Latent) -> tuple[Array, Array]:
        """Pixels of the latents that follow, `b T H W 3`, and True if they are finite."""
        pixels, is_finite, self.state = self._next(self.params, self.state, latents)
        return pixels, is_finite

    def push(self, latents: Latent) -> None:
        """Decodes piece by piece, for `fetch`; waits for nothing."""
        size = self.model.settings.piece_latents(latents.shape[1])
        for start in range(0, latents.shape[1], size):
            piece = self.decode(latents[:, start : start + size])
            for array in piece:
                array.copy_to_host_async()
            self._pending.append(piece)
            self.decoded += 1

    @property
    def num_pending(self) -> int:
        """Number of pieces to fetch."""
        return len(self._pending)

    @property
    def is_ready(self) -> bool:
        """True if the oldest piece can be fetched without waiting."""
        return bool(self._pending) and self._pending[0][0].is_ready()

    def fetch(self) -> UInt8[np.ndarray, "T H W 3"]:
        """Waits for the oldest piece.

        Raises:
            NotFinite: it is NaN or infinity.
        """
        pixels, is_finite = self._pending.popleft()
        frames = np.asarray(pixels)[0]
        if not np.asarray(is_finite):  # it came with the pixels
            raise NotFinite(
                f"the output of {self.model.name} is NaN or infinity from frame "
                f"{self.fetched * len(frames)} on: its weights are too large for their type, or "
                "diverged in training. Convert them again, take an earlier checkpoint, or stream "
                "without --dtype."
            )
        self.fetched += 1
        return frames

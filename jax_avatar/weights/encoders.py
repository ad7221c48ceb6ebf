"""The networks of a model that see the data: VAE, speech encoder, prompt encoder."""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jax_avatar.weights.hashes import content_hash
from jax_avatar.weights.networks import abstract_network, load_network

__all__ = ["Encoders"]


@dataclass(frozen=True)
class Encoders:
    """The networks of a model that see the data, weights bound and compiled.

    Attributes:
        video: `(portrait [1 H W 3], [1 T H W 3]) -> [1 t h w c]`, `T = 1 + 4n`.
        speech: `(wave [1 1 N], frames) -> [1 1 frames k a]`.
        text: `prompt -> [p f]`, or None.
        fps: that the speech encoder makes features for.
        states: hidden states and channels of its features.
        hashes: network -> hash of its weights.
        latent_grid: pixel rows and columns -> those of latents.
    """

    video: Callable[[Any, Any], Any]
    speech: Callable[[Any, int], Any]
    text: Callable[[str], Any] | None
    fps: int
    states: tuple[int, int]
    hashes: Mapping[str, str]
    latent_grid: Callable[[int, int], tuple[int, int]]

    @classmethod
    def load(
        cls,
        folders: Mapping[str, str | Path],
        *,
        text: Callable[[str], Any] | None = None,
        fps: int | None = None,
    ) -> "Encoders":
        """Encoders from model folders; each is read and compiled when it is first needed.

        Args:
            folders: of "vae" and "speech"; of "text" too where `text` is given, for its hash.
            text: see the class.
            fps: video frames per second of the clips; the speech encoder's own if not given.

        Raises:
            ValueError: a folder lacks its weights, or they are of no known network.
        """
        video = _Encoder(folders["vae"], "vae", "encode_clip")
        speech = _Encoder(folders["speech"], "speech", "encode", fps=fps, static=(2,))
        names = ("vae", "speech", "text") if text else ("vae", "speech")
        hashes = {name: content_hash(folders[name], name) for name in names}
        heard, grid = speech.config, video.config.latent_grid
        states = heard.num_states, heard.width
        return cls(video, speech, text, heard.fps, states, hashes, grid)

    def features(self, wave: np.ndarray, frames: int) -> np.ndarray:
        """Features `[T k a]` of the first video frames of a wave `[n]` int16."""
        heard = self.speech(wave[None, None].astype(np.float32) / 32768, frames)
        return np.asarray(heard)[0, 0]


class _Encoder:
    """A compiled method of a network on disk, which is read at the first call."""

    def __init__(
        self,
        folder: str | Path,
        name: str,
        method: str,
        *,
        fps: int | None = None,
        static: tuple[int, ...] = (),
    ):
        # So that a wrong folder fails now.
        self.config = abstract_network(folder, name, fps=fps).config
        self._load = functools.partial(load_network, folder, name, fps=fps)
        self._method, self._static = method, static

    @functools.cached_property
    def _encode(self) -> Callable[..., Any]:
        network = self._load()

        # The weights are an argument: constants of their size take long to compile.
        @functools.partial(jax.jit, static_argnums=self._static)
        def encode(params, *arguments):
            return getattr(network.bind(params), self._method)(*arguments)

        return functools.partial(encode, jax.device_put(network.params))

    def __call__(self, *arguments: Any) -> Any:
        return self._encode(*arguments)

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
        video: `[1 T H W 3] -> [1 t h w c]`, `T = 1 + 4n`.
        speech: `(wave [1 1 N], frames) -> [1 1 frames k a]`.
        text: `prompt -> [p f]`, or None.
        fps: that the speech encoder makes features for.
        states: hidden states and channels of its features.
        hashes: network -> hash of its weights.
        stride: pixels per latent cell.
    """

    video: Callable[[Any], Any]
    speech: Callable[[Any, int], Any]
    text: Callable[[str], Any] | None
    fps: int
    states: tuple[int, int]
    hashes: Mapping[str, str]
    stride: int = 8

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
        video, speech = (_Encoder(folders[name], name, fps) for name in ("vae", "speech"))
        names = ("vae", "speech", "text") if text else ("vae", "speech")
        hashes = {name: content_hash(folders[name], name) for name in names}
        heard = speech.config
        return cls(video, speech, text, heard.fps, (heard.num_states, heard.width), hashes)

    def features(self, wave: np.ndarray, frames: int) -> np.ndarray:
        """Features `[T k a]` of the first video frames of a wave `[n]` int16."""
        heard = self.speech(wave[None, None].astype(np.float32) / 32768, frames)
        return np.asarray(heard)[0, 0]


class _Encoder:
    """The compiled `encode` of a network on disk, read at the first call."""

    def __init__(self, folder: str | Path, name: str, fps: int | None):
        # So that a wrong folder fails now.
        self.config = abstract_network(folder, name, fps=fps).config
        self._load = functools.partial(load_network, folder, name, fps=fps)

    @functools.cached_property
    def _encode(self) -> Callable[..., Any]:
        network = self._load()

        # The weights are an argument: constants of their size take long to compile.
        @functools.partial(jax.jit, static_argnums=2)
        def encode(params, x, frames=None):
            bound = network.bind(params)
            return bound.encode(x) if frames is None else bound.encode(x, frames)

        return functools.partial(encode, jax.device_put(network.params))

    def __call__(self, *arguments: Any) -> Any:
        return self._encode(*arguments)

"""The networks of a model that see the data: VAE, speech encoder, prompt encoder."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from jax_avatar.models.config import WanVAEConfig
from jax_avatar.models.params import abstract, merge
from jax_avatar.models.speech.mel import SpeechConfig, SpeechEncoder
from jax_avatar.models.speech.wav2vec2 import Wav2Vec2, Wav2Vec2Config
from jax_avatar.models.vae.light import LightVAE, LightVAEConfig
from jax_avatar.models.vae.wan import WanVAE
from jax_avatar.weights.content_hash import content_hash
from jax_avatar.weights.fields import fill_fields
from jax_avatar.weights.files import load_header, load_weights

__all__ = ["Encoders"]

_KINDS = {
    "vae": ((LightVAE, LightVAEConfig), (WanVAE, WanVAEConfig)),
    "speech": ((SpeechEncoder, SpeechConfig), (Wav2Vec2, Wav2Vec2Config)),
}


@dataclass(frozen=True)
class Encoders:
    """The networks of a model that see the data, weights bound and compiled.

    Attributes:
        video: `[1 T H W 3] -> [1 t h w c]`, `T = 1 + 4n`.
        speech: `(wave [1 1 N], frames) -> [1 1 frames k a]`.
        text: `prompt -> [p f]`, or None.
        fps: that the speech encoder makes features for.
        states: hidden states and channels of its features.
        weights: network -> hash of its weights.
        stride: pixels per latent cell.
    """

    video: Callable[[Any], Any]
    speech: Callable[[Any, int], Any]
    text: Callable[[str], Any] | None
    fps: int
    states: tuple[int, int]
    weights: Mapping[str, str]
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
        config = _build(folders["speech"], "speech", fps)[1]
        video, speech = (_Encoder(folders[name], name, fps) for name in ("vae", "speech"))
        names = ("vae", "speech", "text") if text else ("vae", "speech")
        weights = {name: content_hash(folders[name], name) for name in names}
        return cls(video, speech, text, config.fps, (config.num_states, config.width), weights)

    def features(self, wave: np.ndarray, frames: int) -> np.ndarray:
        """Features `[T k a]` of the first video frames of a wave `[n]` int16."""
        heard = self.speech(wave[None, None].astype(np.float32) / 32768, frames)
        return np.asarray(heard)[0, 0]


class _Encoder:
    """The compiled `encode` of a network on disk, read at the first call."""

    def __init__(self, folder: str | Path, name: str, fps: int | None):
        _build(folder, name, fps)  # so that a wrong folder fails now
        self._place, self._fps = (folder, name), fps

    @functools.cached_property
    def _encode(self) -> Callable[..., Any]:
        graphdef, _ = _build(*self._place, self._fps)

        # The weights are an argument: constants of their size take long to compile.
        @functools.partial(jax.jit, static_argnums=2)
        def encode(params, x, frames=None):
            network = merge(graphdef, params)
            return network.encode(x) if frames is None else network.encode(x, frames)

        return functools.partial(encode, jax.device_put(load_weights(*self._place)[0]))

    def __call__(self, *arguments: Any) -> Any:
        return self._encode(*arguments)


def _build(folder: str | Path, name: str, fps: int | None) -> tuple[Any, Any]:
    """Structure and config of a network, whose kind its config tells; speech at a rate of frames.

    Raises:
        ValueError: a network of no known kind, or a speech encoder that cannot make that rate.
    """
    fields = load_header(folder, name)[0]
    for network, kind in _KINDS[name]:
        if set(fields) <= {field.name for field in dataclasses.fields(kind)}:
            config = fill_fields(kind, fields, f"{name} in {folder}: config")
            if name == "speech" and fps:
                config = config.at_fps(fps)
            make = functools.partial(_make, network, config)
            return abstract(make)[0], config
    known = ", ".join(network.__name__ for network, _ in _KINDS[name])
    raise ValueError(f"{name} in {folder} is none of {known}; pass the folder of a model.")


def _make(network: type[nnx.Module], config: Any) -> nnx.Module:
    return network(config, rngs=nnx.Rngs(0))

"""Kinds of networks: part of a model folder -> name in `config.json` -> class and config."""

from typing import NamedTuple

from flax import nnx

from jax_avatar.models.config import DiTConfig, UMT5Config, WanVAEConfig
from jax_avatar.models.dit import DiT
from jax_avatar.models.portrait_dit import PortraitDiT
from jax_avatar.models.speech.mel import SpeechConfig, SpeechEncoder
from jax_avatar.models.speech.wav2vec2 import Wav2Vec2, Wav2Vec2Config
from jax_avatar.models.text import UMT5Encoder
from jax_avatar.models.vae.anchored import AnchoredVAE, AnchoredVAEConfig
from jax_avatar.models.vae.light import LightVAE, LightVAEConfig
from jax_avatar.models.vae.wan import WanVAE

__all__ = ["KINDS", "Kind", "find_kind"]


class Kind(NamedTuple):
    """A kind of network.

    Attributes:
        network: its class, built as `network(config, rngs=rngs)`.
        config: the dataclass of its size.
    """

    network: type[nnx.Module]
    config: type


KINDS = {
    "dit": {"wan_s2v": Kind(DiT, DiTConfig), "portrait": Kind(PortraitDiT, DiTConfig)},
    "vae": {
        "light": Kind(LightVAE, LightVAEConfig),
        "wan": Kind(WanVAE, WanVAEConfig),
        "anchored": Kind(AnchoredVAE, AnchoredVAEConfig),
    },
    "speech": {
        "mel": Kind(SpeechEncoder, SpeechConfig),
        "wav2vec2": Kind(Wav2Vec2, Wav2Vec2Config),
    },
    "text": {"umt5": Kind(UMT5Encoder, UMT5Config)},
}
"""Part -> name of the kind -> kind; a new network is added here."""


def find_kind(part: str, name: object, place: object) -> Kind:
    """The kind of a part by its name.

    Args:
        part: "dit", "vae", "speech" or "text".
        name: as `config.json` has it.
        place: where it is written, for the message.

    Raises:
        ValueError: there is no such kind.
    """
    if name not in KINDS[part]:
        raise ValueError(f"{place}: {part} is of kind {name!r}, known are {list(KINDS[part])}.")
    return KINDS[part][name]

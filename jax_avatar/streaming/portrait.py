"""A portrait that stands still -> latents and conditions of a stream."""

import functools
from collections.abc import Callable

import jax
import numpy as np

from jax_avatar.models.conditions import Conditions
from jax_avatar.models.network import Network
from jax_avatar.models.tokens import MOTION_LATENTS
from jax_avatar.shapes import Array, Latent, TextStates
from jax_avatar.weights.folder import AvatarModel
from jax_avatar.weights.settings import StreamSettings

__all__ = ["make_encode", "still_conditions"]


def make_encode(vae: Network, settings: StreamSettings) -> Callable[..., Array]:
    """The compiled encoder of portraits that stand still, as long as the stream needs it.

    Streams of one VAE share it.

    Args:
        vae: structure and size of the video autoencoder; weights are left aside.
        settings: of the stream.

    Returns:
        `(params, portraits) -> latents`.
    """
    latents = settings.warmup_latents
    if settings.motion == "still":
        latents = max(latents, MOTION_LATENTS)
    return _compiled(vae.without_params(), latents)


@functools.lru_cache(maxsize=16)
def _compiled(bare: Network, latents: int) -> Callable[..., Array]:
    @jax.jit
    def encode(params, portrait):
        return bare.bind(params).encode_still(portrait, latents)

    return encode


def still_conditions(
    model: AvatarModel, still: Latent | np.ndarray, text: TextStates | None = None
) -> Conditions:
    """Conditions of a stream.

    Args:
        model: to stream.
        still: latents of portraits that stand still, from `make_encode`.
        text: prompt states; zeros if not given.
    """
    config, settings = model.dit.config, model.settings
    motion = still[:, -MOTION_LATENTS:] if settings.motion == "still" else None
    return Conditions.of_portrait(
        config, still[:, :1], pose=settings.pose, text=text, motion=motion
    )

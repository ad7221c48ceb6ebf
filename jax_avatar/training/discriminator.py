"""Judges patches of neighbouring frames, so that the decoder's errors cannot hide in blur.

Where a latent leaves a detail open, the mean of all possible pictures has the smallest error and
no sharp edge. The discriminator tells such means from frames; matching what it sees in real frames
gives the decoder a reason to draw one of the possible pictures.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jax_avatar.shapes import Video

__all__ = ["discriminate", "discriminator_losses", "init_discriminator"]

_WIDTHS = (24, 48, 48)


def init_discriminator(key: Array) -> dict[str, Any]:
    """Random weights: three strided convolutions and a verdict per patch."""
    params, channels = {}, 6
    for i, width in enumerate((*_WIDTHS, 1)):
        key, part = jax.random.split(key)
        size = 4 if i < len(_WIDTHS) else 1
        scale = np.sqrt(2 / (size**2 * channels))
        params[f"conv{i}"] = {
            "kernel": scale * jax.random.normal(part, (size, size, channels, width)),
            "bias": jnp.zeros(width),
        }
        channels = width
    return params


def discriminate(
    params: dict[str, Any], video: Video
) -> tuple[Float[Array, "n y x 1"], list[Array]]:
    """Verdicts on patches of every two neighbouring frames, positive for real, and what led there.

    Args:
        params: from `init_discriminator`.
        video: two frames or more.
    """
    x = jnp.concatenate([video[:, :-1], video[:, 1:] - video[:, :-1]], axis=-1)
    x = x.reshape(-1, *x.shape[2:])
    features = []
    for i in range(len(_WIDTHS)):
        x = jax.nn.leaky_relu(_conv(params[f"conv{i}"], x, stride=2), 0.2)
        features.append(x)
    return _conv(params[f"conv{len(_WIDTHS)}"], x, stride=1), features


def discriminator_losses(
    params: dict[str, Any], real: Video, decoded: Video
) -> tuple[Float[Array, ""], Float[Array, ""], Float[Array, ""]]:
    """What the discriminator minimises, and two things that the decoder does.

    Args:
        params: of the discriminator.
        real: frames.
        decoded: the decoder's rendering of them.

    Returns:
        The hinge loss, whose gradient reaches `params` alone; then the verdict on the decoded
        frames, negated, and the distance of their features from the real ones, both of whose
        gradients reach `decoded` alone.

    Source: hinge loss, Lim and Ye, arXiv:1705.02894; features, Wang et al., arXiv:1711.11585.
    """
    on_real, _ = discriminate(params, real)
    on_decoded, _ = discriminate(params, jax.lax.stop_gradient(decoded))
    hinge = jnp.mean(jax.nn.relu(1 - on_real)) + jnp.mean(jax.nn.relu(1 + on_decoded))
    frozen = jax.lax.stop_gradient(params)
    _, wanted = discriminate(frozen, real)
    verdict, found = discriminate(frozen, decoded)
    distance = sum(
        jnp.mean(jnp.abs(jax.lax.stop_gradient(w) - f)) for w, f in zip(wanted, found, strict=True)
    )
    return hinge, -jnp.mean(verdict), distance / len(found)


def _conv(params: dict[str, Array], x: Array, *, stride: int) -> Array:
    y = jax.lax.conv_general_dilated(
        x,
        params["kernel"],
        (stride, stride),
        "SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    return y + params["bias"].reshape(1, 1, 1, -1)

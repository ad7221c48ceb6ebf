"""Clean, noise, velocity: the straight path between data and noise, from any two the third.

Source: Liu et al., "Flow Straight and Fast", arXiv 2209.03003.
"""

import jax.numpy as jnp

from jax_avatar.shapes import Array, Latent

__all__ = [
    "add_noise",
    "clean_from_velocity",
    "noise_from_velocity",
    "velocity_from_clean",
    "velocity_toward",
]


def add_noise(clean: Latent, noise: Latent, sigma: Array) -> Latent:
    """`(1 - sigma) * clean + sigma * noise`; `sigma` broadcasts against the latent."""
    return (1 - sigma) * clean + sigma * noise


def velocity_from_clean(clean: Latent, noise: Latent) -> Latent:
    """`noise - clean`, the same all along the path."""
    return noise - clean


def clean_from_velocity(noisy: Latent, velocity: Latent, sigma: Array) -> Latent:
    """The clean latent that a noisy one and its velocity point to."""
    return (noisy.astype(jnp.float32) - sigma * velocity.astype(jnp.float32)).astype(noisy.dtype)


def noise_from_velocity(noisy: Latent, velocity: Latent, sigma: Array) -> Latent:
    """The noise that a noisy latent and its velocity come from."""
    return noisy.astype(jnp.float32) + (1 - sigma) * velocity.astype(jnp.float32)


def velocity_toward(noisy: Latent, clean: Latent, sigma: Array) -> Latent:
    """The velocity that leads from a noisy latent to a clean one; `sigma` above 0."""
    return (noisy.astype(jnp.float32) - clean.astype(jnp.float32)) / sigma

"""One denoising step; every loop in this project is built on it."""

from collections.abc import Callable

import jax.numpy as jnp

from jax_avatar.diffusion.flow import add_noise, clean_from_velocity
from jax_avatar.shapes import Latent, PyTree, Scalar

__all__ = ["VelocityFn", "euler_step", "move"]

VelocityFn = Callable[[Latent, Scalar, PyTree], tuple[Latent, PyTree]]


def euler_step(
    velocity_fn: VelocityFn, latent: Latent, sigma: Scalar, next_sigma: Scalar, cache: PyTree
) -> tuple[Latent, PyTree]:
    """Takes a block from noise level `sigma` to `next_sigma`.

    Args:
        velocity_fn: `(latent, sigma, cache) -> (velocity, cache)`, weights and audio bound.
        latent: the block at `sigma`, in normalised VAE units.
        sigma: noise level in [0, 1]; 1 is pure noise.
        next_sigma: noise level to reach; 0 is the clean block.
        cache: whatever `velocity_fn` carries from block to block; passed through untouched.

    Returns:
        The block at `next_sigma` in the dtype of `latent`, and the cache after this block.

    Source: Liu et al., "Flow Straight and Fast", arXiv 2209.03003.
    """
    velocity, cache = velocity_fn(latent, sigma, cache)
    return move(latent, velocity, sigma, next_sigma), cache


def move(
    latent: Latent,
    velocity: Latent,
    sigma: Scalar,
    next_sigma: Scalar,
    noise: Latent | None = None,
) -> Latent:
    """A latent taken along its velocity to another noise level.

    Args:
        latent: the block at `sigma`.
        velocity: at that latent.
        sigma: its noise level.
        next_sigma: noise level to reach.
        noise: the clean prediction is noised with it anew; without it the predicted noise stays,
            which is Euler's step.
    """
    # A late, small step would round away in bfloat16.
    wide = latent.astype(jnp.float32)
    if noise is None:
        moved = wide + (next_sigma - sigma) * velocity.astype(jnp.float32)
    else:
        clean = clean_from_velocity(wide, velocity, sigma)
        moved = add_noise(clean, noise.astype(jnp.float32), next_sigma)
    return moved.astype(latent.dtype)

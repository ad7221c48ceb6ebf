"""Samples a bidirectional transformer: whole clips, many steps, classifier-free guidance.

noise --40 x (velocity with speech and prompt, velocity without) --> latents of a clip
"""

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jax_avatar.diffusion.schedule import few_step_schedule
from jax_avatar.diffusion.step import euler_step
from jax_avatar.models.conditions import Conditions
from jax_avatar.models.network import Network
from jax_avatar.models.sharding import on_mesh
from jax_avatar.shapes import Array, AudioFeatures, Float, Latent, PyTree
from jax_avatar.training.dmd import guide

__all__ = ["SamplerConfig", "make_sampler"]

Portrait = Float[Array, "b 1 h w c"]


@dataclass(frozen=True)
class SamplerConfig:
    """Settings of the teacher's sampler.

    Attributes:
        num_steps: of Euler, evenly spaced, then shifted; none below the network's own
            `smallest_sigma`, from where the last one leads to the clean clip.
        shift: of the noise levels, toward noise.
        guidance: scale in the standard form; 1 is none.
        seed: of the noise.
    """

    num_steps: int = 40
    shift: float = 3.0
    guidance: float = 4.0
    seed: int = 420


def make_sampler(
    network: Network,
    settings: SamplerConfig,
    *,
    pose: str = "zeros",
    mesh: Mesh | None = None,
) -> Callable[[PyTree, Portrait, AudioFeatures], Latent]:
    """Returns the compiled `(params, reference, features) -> latents` of whole clips.

    What guidance leads away from has neither speech nor prompt, but still the portrait.

    Args:
        network: the transformer; its parameters are not used.
        settings: steps and guidance.
        pose: what the pose input carries: "zeros", or "reference", the portrait.
        mesh: that weights and portraits are spread over, if they are.

    Source: Ho and Salimans, "Classifier-Free Diffusion Guidance", arXiv 2207.12598; the
    conditions are Wan2.2-S2V's.
    """
    levels = few_step_schedule(settings.num_steps, settings.shift).sigmas[:-1]

    def velocity(params, latent, sigma, reference, features):
        timestep = jnp.full(latent.shape[:2], 1000 * sigma)
        conditions = Conditions.of_portrait(network.config, reference, pose=pose, audio=features)
        return network.bind(params).bidirectional(latent, timestep, conditions)

    def guided(params, latent, sigma, reference, features):
        if settings.guidance == 1:
            return velocity(params, latent, sigma, reference, features)
        latents, references = (jnp.concatenate([x, x]) for x in (latent, reference))
        told = jnp.concatenate([features, jnp.zeros_like(features)])
        out = velocity(params, latents, sigma, references, told)
        return guide(*jnp.split(out, 2), settings.guidance)

    def sample(params, reference, features):
        def velocity_fn(latent, sigma, cache):
            return guided(params, latent, sigma, reference, features), cache

        def step(latent, pair):
            return euler_step(velocity_fn, latent, *pair, None)

        low = network.bind(params).smallest_sigma
        sigmas = np.float32([*dict.fromkeys(max(level, low) for level in levels), 0])

        b, _, *rest = reference.shape
        shape = (b, features.shape[2] // 4, *rest)
        noise = jax.random.normal(jax.random.key(settings.seed), shape)
        return jax.lax.scan(step, noise, (sigmas[:-1], sigmas[1:]))[0]

    return jax.jit(on_mesh(sample, mesh))

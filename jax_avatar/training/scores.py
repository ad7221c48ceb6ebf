"""Gradient of the distillation loss in generated clips, from critic and guided teacher.

    clips X --noise, one level each--> y --critic-----------> x_K --+
                                       y --teacher, guided--> x_R --+--> dmd.generator_gradient

Pure functions of networks that have their weights; `dmd.py` has the mathematics.

Source: Live Avatar (arXiv 2512.04677); DMD2 (arXiv 2405.14867).
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Float

from jax_avatar.diffusion.flow import add_noise, clean_from_velocity
from jax_avatar.models.conditions import Conditions
from jax_avatar.models.sharding import constrain
from jax_avatar.shapes import Array, Latent
from jax_avatar.training.distill_state import ClipBatch, DistillConfig
from jax_avatar.training.dmd import (
    critic_loss,
    distillation_loss,
    draw_level,
    generator_gradient,
    guide,
    guide_apart,
)
from jax_avatar.training.run.accumulate import clip_keys

__all__ = ["clip_errors", "clip_velocity", "sample_noise", "score_gradient"]

Levels = Float[Array, "b 1 1 1 1"]


def score_gradient(
    critic: Any,
    teacher: Any,
    clips: Latent,
    batch: ClipBatch,
    key: Array,
    settings: DistillConfig,
    *,
    frames_per_block: int,
) -> tuple[Latent, dict[str, Array]]:
    """Gradient of the distillation loss in the clips, and metrics.

    Among them are `scores`, for `add_scores`: noise level and errors of every clip.

    Args:
        critic: the fake score, a transformer of whole clips.
        teacher: the real score, likewise.
        clips: of the generator.
        batch: their conditions.
        key: of the noise and its level.
        settings: guidance, noise levels and normaliser.
        frames_per_block: latent frames of a block.
    """
    noise, sigma = sample_noise(key, clips, batch.row, settings)
    noisy = add_noise(clips, noise, sigma)
    fake = clip_velocity(critic, noisy, sigma, batch.conditions)
    cond = clip_velocity(teacher, noisy, sigma, batch.conditions)
    guided = _guided(teacher, cond, noisy, sigma, batch.conditions, settings)
    real = clean_from_velocity(noisy, guided, sigma)
    gradient = generator_gradient(
        clips,
        clean_from_velocity(noisy, fake, sigma),
        real,
        normalizer=settings.normalizer,
        frames_per_block=frames_per_block,
        limit=settings.gradient_limit,
    )
    loss, grad_clips = jax.value_and_grad(distillation_loss)(clips, gradient)
    metrics = {
        "dmd_loss": loss,
        "dmd_gradient": jnp.mean(jnp.abs(gradient)),
        "normalizer": jnp.mean(jnp.abs(clips - real)),
        "scores": {
            "sigma": sigma.reshape(-1),
            "critic": clip_errors(fake, clips, noise),
            "teacher": clip_errors(cond, clips, noise),
        },
    }
    return grad_clips, metrics


def sample_noise(
    key: Array, clips: Latent, row: Any, settings: DistillConfig
) -> tuple[Latent, Levels]:
    """Noise and its level, one of each per clip.

    Args:
        key: of the step and role.
        clips: to be noised.
        row: number of each in the whole batch.
        settings: range of the levels.
    """

    def one(key):
        level_key, noise_key = jax.random.split(key)
        level = draw_level(level_key, settings.timestep_shift, settings.sigma_bounds)
        return jax.random.normal(noise_key, clips.shape[1:]), level

    noise, sigma = jax.vmap(one)(clip_keys(key, row))
    return noise, sigma[:, None, None, None, None]


def clip_velocity(net: Any, noisy: Latent, sigma: Levels, conditions: Conditions) -> Latent:
    """Velocity of whole clips, all frames seeing all others."""
    timestep = jnp.broadcast_to(1000 * sigma[:, :, 0, 0, 0], noisy.shape[:2])
    return net.bidirectional(noisy, timestep, conditions)


def clip_errors(velocity: Latent, clips: Latent, noise: Latent) -> Float[Array, " b"]:
    """The critic's loss, clip by clip."""
    return jax.vmap(lambda *clip: critic_loss(*(part[None] for part in clip)))(
        velocity, clips, noise
    )


def _guided(teacher, cond, noisy, sigma, conditions, settings):
    """The teacher's velocity, guided where the settings say so."""
    scale, text_scale = settings.guidance_scale, settings.text_guidance_scale
    if scale == 1 and text_scale in (0, 1):
        return cond
    # Without an explicit sharding, JAX 0.11 computes a wrong velocity on a 4x2 CPU mesh.
    silence = constrain(jnp.zeros_like(conditions.audio), "data")

    def ask(**changes):
        without = dataclasses.replace(conditions, audio=silence, **changes)
        return clip_velocity(teacher, noisy, sigma, without)

    def guided():
        if text_scale == 0:
            return guide(cond, ask(text=conditions.null_text), scale)
        silent = ask()
        null = silent if text_scale == 1 else ask(text=conditions.null_text)
        return guide_apart(cond, silent, null, speech_scale=scale, text_scale=text_scale)

    low, high = settings.guidance_bounds
    if (low, high) == (0, 1):
        return guided()
    is_guided = (low <= sigma) & (sigma <= high)
    # Without a clip in the band, the teacher is not asked.
    return jnp.where(is_guided, jax.lax.cond(is_guided.any(), guided, lambda: cond), cond)

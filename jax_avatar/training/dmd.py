"""Distribution matching distillation: which way the critic and the teacher pull a clip.

    clip X --noise at one level--> y --critic--> x_K --+
                                   y --teacher, guided--> x_R --+--> (x_K - x_R) / mean |X - x_R|

Pure functions of arrays; the networks are whatever made the velocities.

Source: DMD (arXiv 2311.18828), DMD2 (arXiv 2405.14867), Self-Forcing (arXiv 2506.08009).
"""

import jax
import jax.numpy as jnp
from jaxtyping import Float, Int

from jax_avatar.diffusion.flow import velocity_from_clean
from jax_avatar.diffusion.schedule import level_of_draw
from jax_avatar.shapes import Array, Latent, Scalar

__all__ = [
    "NORMALIZERS",
    "critic_loss",
    "distillation_loss",
    "draw_level",
    "generator_gradient",
    "guide",
    "guide_apart",
    "score_level",
]

NORMALIZERS = ("clip", "block")
"""Over what the size of the gradient is measured."""

_DRAWS = 1000


def score_level(
    draw: Int[Array, "..."],
    shift: float = 5.0,
    bounds: tuple[float, float] = (0.02, 0.98),
) -> Float[Array, "..."]:
    """Noise level at which the score networks are evaluated.

    Args:
        draw: integers within 0..999, uniform.
        shift: toward noise.
        bounds: levels are clamped to these; at shift 5 a tenth of the draws lands on the upper.
    """
    return jnp.clip(level_of_draw(draw, shift), *bounds)


def draw_level(
    key: Array, shift: float = 5.0, bounds: tuple[float, float] = (0.02, 0.98)
) -> Float[Array, ""]:
    """Draws one `score_level`, for a whole clip."""
    return score_level(jax.random.randint(key, (), 0, _DRAWS), shift, bounds)


def guide(cond: Latent, null: Latent, scale: float) -> Latent:
    """Classifier-free guidance in the standard scale: 1 is `cond`, exactly.

    The Self-Forcing code counts from 0 instead: its `guidance_scale` 3 is 4 here.
    """
    return cond + (scale - 1) * (cond - null)


def guide_apart(
    cond: Latent, silent: Latent, null: Latent, *, speech_scale: float, text_scale: float
) -> Latent:
    """Guidance by prompt and by speech, each in the standard scale.

    `null + text_scale (silent - null) + speech_scale (cond - silent)`, summed from `cond`, so that
    scales of 1 give exactly `cond`.

    Args:
        cond: velocity with prompt and speech.
        silent: with the prompt, without speech.
        null: without either.
        speech_scale: of the difference that speech makes.
        text_scale: of the difference that the prompt makes.

    Source: LiveTalk (arXiv 2512.23576).
    """
    return cond + (speech_scale - 1) * (cond - silent) + (text_scale - 1) * (silent - null)


def generator_gradient(
    clean: Latent,
    fake: Latent,
    real: Latent,
    *,
    normalizer: str = "clip",
    frames_per_block: int = 3,
    floor: float = 1e-3,
    limit: float = 10.0,
) -> Latent:
    """Direction away from the critic's and toward the teacher's prediction, normalised.

    Args:
        clean: clips that the generator made.
        fake: the critic's clean prediction of the noised clips.
        real: the guided teacher's.
        normalizer: "clip" divides by `mean |clean - real|` of a clip, "block" by that of a block.
        frames_per_block: latent frames of a block, for "block".
        floor: smallest divisor. The official division by zero gives 3e38, which is finite.
        limit: largest element of the result.

    Returns:
        float32; zero exactly where critic and guided teacher agree.
    """
    clean, fake, real = (x.astype(jnp.float32) for x in (clean, fake, real))
    b, t = clean.shape[:2]
    if normalizer not in NORMALIZERS:
        raise ValueError(f"normalizer {normalizer!r} must be one of {', '.join(NORMALIZERS)}.")
    groups = t // frames_per_block if normalizer == "block" else 1
    if t % groups:
        raise ValueError(f"{t} latent frames are no whole number of blocks; drop the last ones.")
    # Frame by frame, since a long sum in float32 loses digits.
    distance = jnp.abs(clean - real).mean((2, 3, 4)).reshape(b, groups, -1).mean(-1)
    distance = jnp.repeat(distance, t // groups, axis=1)[:, :, None, None, None]
    return jnp.clip((fake - real) / jnp.maximum(distance, floor), -limit, limit)


def distillation_loss(
    clean: Latent, gradient: Latent, mask: Float[Array, "b t h w c"] | None = None
) -> Scalar:
    """A loss whose gradient in `clean` is `gradient / number of elements`, exactly.

    Args:
        clean: clips that the generator made.
        gradient: from `generator_gradient`.
        mask: 1 where an element counts, 0 where not; all count if not given.
    """
    clean = clean.astype(jnp.float32)
    gradient = jax.lax.stop_gradient(gradient)
    # 0.5 (clean - sg(clean - gradient))^2, without rounding the gradient to the size of `clean`.
    square = 0.5 * jnp.square(gradient + (clean - jax.lax.stop_gradient(clean)))
    if mask is None:
        return jnp.mean(jnp.mean(square, (2, 3, 4)))
    return jnp.sum(jnp.sum(square * mask, (2, 3, 4))) / jnp.sum(mask)


def critic_loss(velocity: Latent, clean: Latent, noise: Latent) -> Scalar:
    """Flow matching on clips that the generator made, directly on the velocity.

    Args:
        velocity: the critic's, at the noised clips.
        clean: the generator's clips.
        noise: that they were noised with.
    """
    target = velocity_from_clean(clean.astype(jnp.float32), noise.astype(jnp.float32))
    return jnp.mean(jnp.square(velocity.astype(jnp.float32) - jax.lax.stop_gradient(target)))

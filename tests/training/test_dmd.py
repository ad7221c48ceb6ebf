import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_avatar.diffusion.flow import add_noise
from jax_avatar.training.dmd import (
    critic_loss,
    distillation_loss,
    draw_level,
    generator_gradient,
    guide,
)

SHAPE = (2, 6, 2, 3, 4)


def latents(count, seed=0):
    return jax.random.normal(jax.random.key(seed), (count, *SHAPE))


@pytest.mark.parametrize("normalizer", ["clip", "block"])
def test_the_gradient_vanishes_where_critic_and_guided_teacher_agree(normalizer):
    clean, cond, null = latents(3)
    real = guide(cond, null, 4.0)
    assert not generator_gradient(clean, real, real, normalizer=normalizer).any()
    assert generator_gradient(clean, cond, real, normalizer=normalizer).any()


def test_guidance_of_one_is_the_condition_exactly():
    cond, null = latents(2)
    np.testing.assert_array_equal(guide(cond, null, 1.0), cond)


def test_the_slope_of_the_loss_is_the_gradient_over_its_size():
    clean, fake, real = latents(3)
    gradient = generator_gradient(clean, fake, real)
    slope = jax.grad(distillation_loss)(clean, gradient)
    np.testing.assert_allclose(slope, gradient / clean.size, rtol=1e-6)


def test_networks_get_no_gradient_from_the_distillation_loss():
    clean, fake, real = latents(3)

    def loss(fake, real):
        return distillation_loss(clean, generator_gradient(clean, fake, real))

    assert not any(slope.any() for slope in jax.grad(loss, (0, 1))(fake, real))


def test_the_critics_loss_does_not_move_the_generator():
    clean, velocity, noise = latents(3)
    slopes = jax.grad(critic_loss, (0, 1))(velocity, clean, noise)
    assert slopes[0].any() and not slopes[1].any()


def test_a_clip_is_scaled_on_its_own():
    clean, fake, real = latents(3)
    alone = generator_gradient(clean[:1], fake[:1], real[:1])
    np.testing.assert_allclose(generator_gradient(clean, fake, real)[:1], alone, rtol=1e-6)


def test_a_teacher_that_agrees_with_the_clip_does_not_explode():
    clean, fake, _ = latents(3)
    fake = fake.at[:, 0].set(clean[:, 0])
    gradient = generator_gradient(clean, fake, clean)
    assert np.isfinite(gradient).all() and abs(gradient).max() == 10
    assert not gradient[:, 0].any()


def test_masked_elements_do_not_count():
    clean, fake, real = latents(3)
    gradient = generator_gradient(clean, fake, real)
    mask = jnp.ones(SHAPE).at[:, :3].set(0)
    slope = jax.grad(distillation_loss)(clean, gradient, mask)
    assert not slope[:, :3].any()
    np.testing.assert_allclose(slope[:, 3:], gradient[:, 3:] / mask.sum(), rtol=1e-6)


def test_levels_stay_within_their_bounds_and_lean_toward_noise():
    levels = jax.vmap(draw_level)(jax.random.split(jax.random.key(0), 2000))
    assert levels.min() >= 0.02 and levels.max() == np.float32(0.98)
    assert 0.07 < np.mean(np.asarray(levels) == np.float32(0.98)) < 0.12
    assert np.median(levels) > 0.7


def test_a_normalizer_nobody_knows_is_named():
    with pytest.raises(ValueError, match="normalizer 'batch' must be one of clip, block"):
        generator_gradient(*latents(3), normalizer="batch")


@pytest.mark.parametrize("sign", [1, -1])
def test_a_shift_of_gaussian_data_is_learnt_and_flees_with_the_wrong_sign(sign):
    """Data N(2, 1), generator `noise + theta`, both score networks in closed form."""

    def predicted(noisy, sigma, mean):
        keep = 1 - sigma
        return mean + keep / (keep**2 + sigma**2) * (noisy - keep * mean)

    def update(theta, key):
        keys = jax.random.split(key, 3)
        clean = jax.random.normal(keys[0], SHAPE) + theta
        sigma = jax.vmap(draw_level)(jax.random.split(keys[1], SHAPE[0]))
        wide = sigma[:, None, None, None, None]
        noisy = add_noise(clean, jax.random.normal(keys[2], SHAPE), wide)
        fake, real = (predicted(noisy, wide, mean) for mean in (theta, 2.0))
        slope = sign * generator_gradient(clean, fake, real).mean()
        return theta - 0.2 * slope, None

    theta, _ = jax.jit(
        lambda: jax.lax.scan(update, 0.0, jax.random.split(jax.random.key(0), 200))
    )()
    assert abs(theta - 2) < 1e-2 if sign > 0 else theta < -5

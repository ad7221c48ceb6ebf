import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_avatar.diffusion.flow import add_noise, clean_from_velocity, velocity_from_clean
from jax_avatar.diffusion.step import euler_step


@pytest.mark.parametrize("num_steps", [1, 4])
def test_exact_velocity_leads_to_the_clean_latent(num_steps):
    clean, noise = jax.random.normal(jax.random.key(0), (2, 1, 3, 4, 4, 16))  # each b t h w c

    def velocity_fn(latent, sigma, cache):
        return noise - clean, cache

    latent = noise
    for sigma, next_sigma in itertools.pairwise(np.linspace(1.0, 0.0, num_steps + 1).tolist()):
        latent, _ = euler_step(velocity_fn, latent, sigma, next_sigma, cache=None)
    np.testing.assert_allclose(latent, clean, atol=1e-5)


def test_a_step_too_small_for_bfloat16_still_counts():
    latent = jnp.full((1, 1, 1, 1, 1), 1.0, jnp.bfloat16)
    moved, cache = euler_step(
        lambda x, sigma, cache: (jnp.full_like(x, -1.0), cache + 1), latent, 0.009, 0.0, 41
    )
    assert moved.dtype == jnp.bfloat16 and cache == 42
    assert float(moved[0, 0, 0, 0, 0]) > 1.0


def test_clean_noise_and_velocity_agree():
    clean, noise = jax.random.normal(jax.random.key(1), (2, 1, 3, 4, 4, 2))
    for sigma in (0.1, 0.9):
        sigma = jnp.full((1, 1, 1, 1, 1), sigma)
        noisy = add_noise(clean, noise, sigma)
        velocity = velocity_from_clean(clean, noise)
        np.testing.assert_allclose(clean_from_velocity(noisy, velocity, sigma), clean, atol=1e-5)

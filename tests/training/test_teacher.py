import functools

import jax
import jax.numpy as jnp
import numpy as np

from jax_avatar import testing
from jax_avatar.models.network import Network
from jax_avatar.training.teacher import SamplerConfig, make_sampler

MODEL = testing.NANO.replace(framepack=False, num_layers=1)
KEYS = jax.random.split(jax.random.key(4), 2)
REFERENCE = jax.random.normal(KEYS[0], (2, 1, 4, 4, 4))
FEATURES = jax.random.normal(KEYS[1], (2, 1, 24, 2, 6))


@functools.cache
def sampler(guidance, num_steps=1):
    network = testing.make_network(MODEL)
    settings = SamplerConfig(num_steps, guidance=guidance)
    sample = make_sampler(network, settings, pose="reference")
    return functools.partial(sample, network.params)


def test_guidance_leads_away_from_a_clip_without_speech_but_with_the_portrait():
    """In one step the clip is linear in the guidance scale."""
    told, untold = (sampler(1.0)(REFERENCE, f) for f in (FEATURES, jnp.zeros_like(FEATURES)))
    guided = sampler(4.0)(REFERENCE, FEATURES)
    np.testing.assert_allclose(guided, told + 3 * (told - untold), atol=2e-5)
    assert np.abs(told - untold).max() > 1e-3


def test_no_step_starts_below_the_networks_smallest_level():
    """A network that divides by no less than half cannot lead to its prediction from there."""

    class Halved(Network):
        smallest_sigma = 0.5

        def bind(self, params):
            return self

        def bidirectional(self, noisy, timestep, conditions):
            return (noisy - 7) / jnp.maximum(timestep[:, :, None, None, None] / 1000, 0.5)

    for steps in (1, 8):
        settings = SamplerConfig(steps, shift=1.0, guidance=1.0)
        sample = make_sampler(Halved({}, None, MODEL), settings)
        np.testing.assert_allclose(sample({}, REFERENCE, FEATURES), 7, atol=1e-5)


def test_a_clip_is_as_long_as_its_speech_and_more_steps_make_another():
    clip = sampler(1.0, 3)(REFERENCE, FEATURES)
    assert clip.shape == (2, 6, 4, 4, 4)
    assert np.abs(clip - sampler(1.0)(REFERENCE, FEATURES)).max() > 1e-3

import functools

import jax
import jax.numpy as jnp
import numpy as np

from jax_avatar.training.teacher import SamplerConfig, make_sampler
from tests import nano

MODEL = nano.CONFIG.replace(framepack=False, num_layers=1)
KEYS = jax.random.split(jax.random.key(4), 2)
REFERENCE = jax.random.normal(KEYS[0], (2, 1, 4, 4, 4))
FEATURES = jax.random.normal(KEYS[1], (2, 1, 24, 2, 6))


@functools.cache
def sampler(guidance, num_steps=1):
    graphdef, params = nano.make_dit(MODEL)
    settings = SamplerConfig(num_steps, guidance=guidance)
    sample = make_sampler(graphdef, MODEL, settings, pose="reference")
    return functools.partial(sample, params)


def test_guidance_leads_away_from_a_clip_without_speech_but_with_the_portrait():
    """In one step the clip is linear in the guidance scale."""
    told, untold = (sampler(1.0)(REFERENCE, f) for f in (FEATURES, jnp.zeros_like(FEATURES)))
    guided = sampler(4.0)(REFERENCE, FEATURES)
    np.testing.assert_allclose(guided, told + 3 * (told - untold), atol=2e-5)
    assert np.abs(told - untold).max() > 1e-3


def test_a_clip_is_as_long_as_its_speech_and_more_steps_make_another():
    clip = sampler(1.0, 3)(REFERENCE, FEATURES)
    assert clip.shape == (2, 6, 4, 4, 4)
    assert np.abs(clip - sampler(1.0)(REFERENCE, FEATURES)).max() > 1e-3

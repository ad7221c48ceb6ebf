import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_avatar.diffusion.sampling import Sampling, noised

SIGMAS = (1.0, 0.6, 0.0)
STEPS = ((1.0, 0.6), (0.6, 0.0))


@pytest.mark.parametrize(
    ("settings", "levels", "windows", "takes_noise"),
    [
        ({}, STEPS, 2, False),
        ({"sampler": "renoise"}, STEPS, 2, True),
        ({"cache": "exit_only"}, STEPS, 1, False),
        ({"refresh": "clean"}, (*STEPS, (0.0, 0.0)), 1, True),
        ({"refresh": "fixed"}, (*STEPS, (0.557, 0.557)), 1, True),
        ({"refresh": "fixed", "refresh_sigma": 0.3}, (*STEPS, (0.3, 0.3)), 1, True),
    ],
    ids=str,
)
def test_histories_differ_in_evaluations_windows_and_noise(settings, levels, windows, takes_noise):
    sampling = Sampling(sigmas=SIGMAS, **settings)
    assert sampling.levels == levels and sampling.num_evaluations == len(levels)
    assert (sampling.num_windows, sampling.takes_noise) == (windows, takes_noise)
    assert sampling.shares_history == (windows == 1)
    assert Sampling(**sampling.sampling()) == sampling


@pytest.mark.parametrize(
    ("name", "timesteps"),
    [
        ("self_forcing", [1000, 937.5, 833.333, 625]),
        ("self_forcing:3", [1000, 909.091, 714.286]),
        ("self_forcing:2", [1000, 833.333]),
        ("shift3", [1000, 900, 750, 500]),
        ("paper_uniform", [1000, 750, 500, 250]),
        ("released", [1000, 857.692, 602.151, 8.929]),
        ("released:1", [1000]),
    ],
)
def test_levels_have_names(name, timesteps):
    sampling = Sampling(sigmas=name)
    np.testing.assert_allclose(1000 * np.array(sampling.sigmas), [*timesteps, 0], atol=1e-3)
    assert sampling.sampling()["sigmas"] == list(sampling.sigmas)


def test_a_finished_block_is_noised_in_float32_and_left_alone_at_level_0():
    clean, noise = jax.random.normal(jax.random.key(0), (2, 1, 3, 2, 2, 4))
    half = clean.astype("bfloat16")
    np.testing.assert_array_equal(noised(half, noise, jnp.float32(0)), half)
    made = noised(clean, noise, jnp.float32(0.25))
    np.testing.assert_allclose(made, 0.75 * clean + 0.25 * noise, atol=1e-6)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"sampler": "heun"}, "sampler 'heun' must be one of euler, renoise"),
        ({"cache": "none"}, "cache 'none' must be one of per_step, exit_only"),
        ({"refresh": "dirty"}, "refresh 'dirty' must be one of none, clean, fixed"),
        ({"refresh_sigma": 1.0}, "refresh_sigma 1.0 must be between 0 and 1"),
        ({"sigmas": (1.0, 0.5)}, "must fall"),
        (
            {"sigmas": "shift4"},
            r"'shift4': expected one of self_forcing, shift3, .* self_forcing:3",
        ),
        ({"sigmas": "shift3:0"}, r"'shift3:0': expected"),
        ({"sigmas": "shift3:"}, r"'shift3:': expected"),
        ({"sink_distance": (5, 4)}, "the smaller first"),
        ({"sink_distance": (5,)}, "two numbers"),
    ],
)
def test_impossible_settings_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        Sampling(**{"sigmas": SIGMAS, **fields})

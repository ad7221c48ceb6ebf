import numpy as np
import pytest

from jax_avatar.diffusion.schedule import Schedule, euler_schedule, shift_sigma, uniform_schedule


def test_the_released_four_steps():
    expected = [1000.0, 857.6923, 602.1506, 8.928572]
    np.testing.assert_allclose(euler_schedule(4).timesteps, expected, rtol=1e-6)


@pytest.mark.parametrize("num_steps", [1, 2, 4, 40])
def test_levels_fall_from_noise_to_clean(num_steps):
    for schedule in (euler_schedule(num_steps), uniform_schedule(num_steps)):
        assert schedule.num_steps == num_steps == len(schedule.timesteps)
        assert schedule.sigmas[0] == 1 and schedule.sigmas[-1] == 0
        assert (np.diff(schedule.sigmas) < 0).all()


def test_shift_moves_toward_noise_and_keeps_the_ends():
    sigma = np.linspace(0, 1, 11)
    shifted = shift_sigma(sigma, 3.0)
    assert shifted[0] == 0 and shifted[-1] == 1
    assert (shifted[1:-1] > sigma[1:-1]).all()


@pytest.mark.parametrize(
    "sigmas", [(1.0,), (0.5, 1.0, 0.0), (1.0, 0.5), (1.5, 0.0), (1.0, 1.0, 0.0)]
)
def test_other_levels_are_refused(sigmas):
    with pytest.raises(ValueError, match="must fall"):
        Schedule(sigmas)


def test_no_steps_are_refused():
    with pytest.raises(ValueError, match="at least 1"):
        euler_schedule(0)

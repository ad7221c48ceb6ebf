import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_avatar.pixels import frame_psnr, from_uint8, psnr, to_uint8


@pytest.mark.parametrize("make", [np.asarray, jnp.asarray, jax.jit(lambda x: x)])
def test_all_pixels_survive_the_range_of_the_networks(make):
    pixels = np.arange(256, dtype=np.uint8)
    video = from_uint8(make(pixels))
    assert video.dtype == np.float32
    assert (float(video.min()), float(video.max())) == (-1, 1)
    np.testing.assert_array_equal(to_uint8(video), pixels)
    np.testing.assert_array_equal(to_uint8(make(np.float32([-3, 1.5]))), [0, 255])


def test_psnr_counts_squared_errors_where_it_is_told_to():
    assert psnr(255.0**2) == psnr(np.float32(255**2)) == 0
    assert psnr(0.0) == pytest.approx(68.1, abs=0.1)
    error = np.zeros((2, 4, 4), np.float32)
    error[1, 0, 0] = 16
    corner = np.zeros_like(error)
    corner[:, 0, 0] = 1
    np.testing.assert_allclose(frame_psnr(error)[1], psnr(1.0))
    np.testing.assert_allclose(frame_psnr(error, corner)[1], psnr(16.0))

import numpy as np
import pytest

from jax_avatar.models.speech.feature_rate import bucket_indices, num_frames_30hz, to_30hz


def test_end_points_stay():
    features = np.random.default_rng(0).normal(size=(2, 50, 3)).astype(np.float32)
    out = to_30hz(features)
    assert out.shape == (2, 30, 3)
    np.testing.assert_allclose(out[:, 0], features[:, 0], atol=1e-6)
    np.testing.assert_allclose(out[:, -1], features[:, -1], atol=1e-5)


def test_the_order_of_operations_matters():
    assert num_frames_30hz(205) == 122  # exact arithmetic would give 123


def test_frames_beyond_the_sound_have_none():
    index = bucket_indices(299, 25, 48)
    assert len(index) == 288 and (index[249:] == -1).all() and index[248] == 298
    assert index[:9].tolist() == [0, 1, 2, 4, 5, 6, 7, 8, 10]


def test_a_single_frame_is_too_short():
    with pytest.raises(ValueError, match="at least 2"):
        to_30hz(np.zeros((1, 1, 4), np.float32))

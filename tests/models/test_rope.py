import jax
import jax.numpy as jnp
import numpy as np

from jax_avatar.models.rope import axis_rotation, frame_rotation, pooled_positions, rotate


def test_scores_depend_on_distance_only_however_far_the_stream_is():
    query, key = jax.random.normal(jax.random.key(0), (2, 1, 1, 1, 16))

    def score(at, distance):
        turn = axis_rotation([at, at + distance], 8, theta=10000.0, half=False)
        first = rotate(query, type(turn)(turn.cos[:1], turn.sin[:1]))
        second = rotate(key, type(turn)(turn.cos[1:], turn.sin[1:]))
        return float((first * second).sum())

    for distance in (0, 3, 30):
        near, far = score(0, distance), score(10**9, distance)
        np.testing.assert_allclose(near, far, atol=2e-6)
    assert abs(score(0, 0) - score(0, 3)) > 1e-3


def test_rotation_keeps_length():
    x = jax.random.normal(jax.random.key(0), (1, 4, 2, 12))
    turn = axis_rotation([0, 1, 50, -7], 6, theta=10000.0, half=False)
    norms = [jnp.linalg.norm(y, axis=-1) for y in (x, rotate(x, turn))]
    np.testing.assert_allclose(*norms, rtol=1e-6)


def test_negative_positions_turn_the_other_way():
    there, back = (frame_rotation([p], 12, theta=10000.0, half=False) for p in (5, -5))
    np.testing.assert_array_equal(there.cos, back.cos)
    np.testing.assert_array_equal(there.sin, -back.sin)


def test_pooled_positions_are_truncated_samples():
    assert pooled_positions(44, 11).tolist() == [0, 4, 8, 12, 17, 21, 25, 30, 34, 38, 43]
    assert pooled_positions(4, 1).tolist() == [0]

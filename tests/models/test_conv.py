"""Causal 3-D convolution: both backends, chunks, causality."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_avatar.models.vae.conv import causal_conv3d


def example(kt=3, k=3, frames=5):
    keys = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(keys[0], (2, frames, 6, 5, 4))
    kernel = jax.random.normal(keys[1], (kt, k, k, 4, 3))
    return x, kernel, jax.random.normal(keys[2], (3,))


@pytest.mark.parametrize(
    ("kt", "k", "padding"), [(3, 3, 1), (3, 1, 0), (1, 3, "VALID"), (2, 3, "SAME")]
)
def test_backends_agree(kt, k, padding):
    x, kernel, bias = example(kt, k)
    buffer = jax.random.normal(jax.random.key(1), (2, kt - 1, 6, 5, 4))
    frames, frames_buffer = causal_conv3d(
        x, kernel, bias, buffer, spatial_padding=padding, backend="frames"
    )
    volume, volume_buffer = causal_conv3d(
        x, kernel, bias, buffer, spatial_padding=padding, backend="volume"
    )
    np.testing.assert_allclose(frames, volume, atol=2e-5)
    np.testing.assert_array_equal(frames_buffer, volume_buffer)


@pytest.mark.parametrize("chunks", [[1, 4], [1, 1, 3], [2, 3]])
def test_chunks_give_what_the_whole_gives(chunks):
    x, kernel, bias = example()
    whole, _ = causal_conv3d(x, kernel, bias)
    buffer, parts = None, []
    for part in jnp.split(x, np.cumsum(chunks)[:-1], axis=1):
        y, buffer = causal_conv3d(part, kernel, bias, buffer)
        parts.append(y)
    np.testing.assert_allclose(jnp.concatenate(parts, axis=1), whole, atol=1e-5)


def test_later_frames_change_nothing_earlier():
    x, kernel, bias = example()
    changed, _ = causal_conv3d(x.at[:, 3:].add(1.0), kernel, bias)
    whole, _ = causal_conv3d(x, kernel, bias)
    np.testing.assert_array_equal(changed[:, :3], whole[:, :3])
    assert jnp.abs(changed[:, 3:] - whole[:, 3:]).min() > 0


def test_a_buffer_of_the_wrong_length_is_named():
    x, kernel, bias = example()
    with pytest.raises(ValueError, match="holds 1 frames"):
        causal_conv3d(x, kernel, bias, x[:, :1])

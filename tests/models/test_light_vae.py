"""The light VAE: frame layout, causality, chunks, and its linear start."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jax_avatar.models.network import Network
from jax_avatar.models.vae.light import (
    LightVAE,
    LightVAEConfig,
    principal_components,
    with_patch_basis,
)

NANO = LightVAEConfig(
    z_dim=5,
    latent_width=8,
    frame_width=6,
    stem_width=4,
    encoder_blocks=1,
    latent_blocks=1,
    frame_blocks=1,
    latent_mean=(0.3, -0.2, 0.1, 0.0, 0.5),
    latent_std=(1.5, 0.5, 2.0, 1.0, 0.7),
)


def noisy_model(config=NANO):
    """A model without the zeros that the last convolutions start with."""
    network = Network.of(LightVAE(config, rngs=nnx.Rngs(0)))
    params = network.params
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    leaves = [x + 0.05 * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys, strict=True)]
    return network.bind(jax.tree.unflatten(tree, leaves))


def clip(frames=9, size=32):
    return jax.random.uniform(jax.random.key(2), (2, frames, size, size, 3), minval=-1, maxval=1)


@pytest.mark.parametrize("chunks", [pytest.param([2], marks=pytest.mark.slow), [1, 1]])
def test_chunks_decode_to_the_whole(chunks):
    model = noisy_model()
    latent = jax.random.normal(jax.random.key(3), (2, 3, 4, 4, 5))
    whole = model.decode(latent)
    video, state = model.decode_first(latent[:, :1])
    parts, start = [video], 1
    for count in chunks:
        video, state = model.decode_next(state, latent[:, start : start + count])
        parts.append(video)
        start += count
    assert whole.shape == (2, 9, 32, 32, 3)
    np.testing.assert_allclose(jnp.concatenate(parts, axis=1), whole, atol=1e-5)


def test_a_latent_knows_nothing_of_later_frames():
    model, video = noisy_model(), clip()
    latent = model.encode(video)
    changed = model.encode(video.at[:, 5:].add(0.5))
    assert latent.shape == (2, 3, 4, 4, 5)
    np.testing.assert_array_equal(changed[:, :2], latent[:, :2])
    assert jnp.abs(changed[:, 2] - latent[:, 2]).max() > 1e-3


def test_frames_know_the_latent_before_but_no_later_one():
    model = noisy_model()
    latent = jax.random.normal(jax.random.key(3), (1, 4, 4, 4, 5))
    moved = jnp.abs(model.decode(latent.at[:, 2].add(1.0)) - model.decode(latent)).max((0, 2, 3, 4))
    np.testing.assert_array_equal(moved[:5], 0.0)
    assert moved[5:].min() > 0  # of its own four frames and of the next four


def test_normalisation_is_undone_by_decoding():
    network = Network.of(noisy_model())
    plain_config = LightVAEConfig(**{**NANO.to_dict(), "latent_mean": (), "latent_std": ()})
    plain = Network.abstract(LightVAE, plain_config).bind(network.params)
    model, video = network.bind(), clip(5)
    latent = model.encode(video)
    np.testing.assert_allclose(
        latent * np.reshape(NANO.latent_std, (1, 1, 1, 1, -1))
        + np.reshape(NANO.latent_mean, (1, 1, 1, 1, -1)),
        plain.encode(video),
        atol=1e-5,
    )
    np.testing.assert_allclose(model.decode(latent), plain.decode(plain.encode(video)), atol=1e-4)


def test_principal_components_restore_what_they_span():
    rng = np.random.default_rng(0)
    # Clips of a few fixed pictures with changing strength: patches span four dimensions.
    pictures = np.tile(rng.normal(size=(4, 8, 8, 3)), (1, 2, 2, 1))
    strength = rng.normal(size=(6, 1, 4)) * np.array([4.0, 2.0, 1.0, 0.5])
    video = np.einsum("btk,khwc->bthwc", np.repeat(strength, 5, axis=1), pictures)
    video = video.astype(np.float32)
    frames = jnp.asarray(video)
    basis = principal_components(video, np.ones(video.shape[:4], np.float32), 5, whitening=0.5)
    network = Network.of(LightVAE(NANO, rngs=nnx.Rngs(0)))
    model = network.bind(with_patch_basis(network.params, basis))
    np.testing.assert_allclose(model.decode(model.encode(frames)), video, atol=1e-2)
    # Components are ordered, and the spread of channels is that of components, compressed.
    spread = np.asarray(model.encoder.patch(_patches(video))).reshape(-1, 5).std(0)
    assert np.all(np.diff(spread) < 0)
    np.testing.assert_allclose(spread[0] / spread[3], np.sqrt(8.0), rtol=0.35)
    np.testing.assert_allclose(np.mean(spread**2), 1.0, rtol=0.1)


def _patches(video):
    groups = video[:, 1:].reshape(6, 1, 4, 2, 8, 2, 8, 3)
    return groups.transpose(0, 1, 3, 5, 2, 4, 6, 7).reshape(6, 1, 2, 2, 768)


@pytest.mark.parametrize("shape", [(1, 4, 32, 32, 3), (1, 5, 30, 32, 3)])
def test_a_clip_that_does_not_fit_is_named(shape):
    with pytest.raises(ValueError, match="1, 5, 9"):
        noisy_model().encode(jnp.zeros(shape))


def test_configs_are_checked():
    with pytest.raises(ValueError, match="latent_std has 2 numbers"):
        LightVAEConfig(z_dim=4, latent_std=(1.0, 2.0))
    with pytest.raises(ValueError, match="strides 8 and 4"):
        LightVAEConfig(spatial_stride=16)


@pytest.mark.parametrize(
    "field",
    ["z_dim", "latent_width", "frame_width", "stem_width", "encoder_blocks", "latent_blocks",
     "frame_blocks"],
)  # fmt: skip
def test_every_size_is_in_the_weights(field):
    def shapes(**changes):
        config = dataclasses.replace(NANO, latent_mean=(), latent_std=(), **changes)
        graph = nnx.eval_shape(lambda: LightVAE(config, rngs=nnx.Rngs(0)))
        return str(jax.tree.map(lambda leaf: leaf.shape, nnx.to_pure_dict(nnx.state(graph))))

    assert shapes() != shapes(**{field: getattr(NANO, field) + 1})


def test_latents_are_normalised():
    plain = dataclasses.replace(NANO, latent_mean=(), latent_std=())
    network = Network.of(noisy_model(plain))
    raw = np.asarray(network.bind().encode(clip(5)))
    mean, std = np.float32([0.3, -0.2, 0.1, 0.0, 0.5]), np.float32([1.5, 0.5, 2.0, 1.0, 0.7])
    np.testing.assert_allclose(noisy_model().encode(clip(5)), (raw - mean) / std, atol=1e-4)

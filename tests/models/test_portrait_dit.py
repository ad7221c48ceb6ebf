import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from jax_avatar.models.cache import block_position, empty_cache
from jax_avatar.models.config import DiTConfig
from jax_avatar.models.params import merge, split
from jax_avatar.models.portrait_dit import BlockAudioEncoder, PortraitDiT

CONFIG = DiTConfig(
    width=24,
    ffn_width=48,
    num_heads=2,
    num_layers=2,
    freq_width=32,
    text_width=4,
    text_len=2,
    latent_channels=4,
    pose_channels=4,
    audio_width=6,
    audio_layers=2,
    audio_inject_layers=(0,),
    audio_history=1,
    framepack=False,
    zero_init=False,
)


def make_dit():
    dit = PortraitDiT(CONFIG, rngs=nnx.Rngs(0))
    kernel = dit.head.kernel
    kernel[...] = jax.random.normal(jax.random.key(9), kernel.shape)
    return dit


def test_a_stream_computes_what_was_trained():
    dit, blocks, sigma = make_dit(), 3, 0.6
    keys = jax.random.split(jax.random.key(0), 3)
    noisy = jax.random.normal(keys[0], (1, 3 * blocks, 4, 4, 4))
    reference = jax.random.normal(keys[1], (1, 1, 4, 4, 4))
    audio = jax.random.normal(keys[2], (1, 1, 12 * blocks, 2, 6))
    text = jnp.zeros((1, 1, 4))
    pose = jnp.broadcast_to(reference, noisy.shape)
    timestep = jnp.full((1, 3 * blocks), 1000 * sigma)
    whole = dit.block_causal(
        noisy, timestep, text, reference, None, pose, audio, reference_frame=jnp.int32(30)
    )
    sink = dit.prefill(text, reference, None)
    cache = empty_cache(CONFIG, 1, 4, 4)
    for block in range(blocks):
        part = slice(3 * block, 3 * block + 3)
        velocity, cache = dit.stream_block(
            noisy[:, part],
            timestep[:, part],
            pose[:, part],
            audio[:, :, 12 * block : 12 * block + 12],
            cache,
            sink,
            block_position(CONFIG, block, 4),
        )
        np.testing.assert_allclose(velocity, whole[:, part], atol=2e-4)


def test_dropped_speech_does_not_blow_up_the_gradient():
    """Dropped speech is zeros, and a norm of nothing but zeros multiplies gradients by 1000."""
    graphdef, params = split(BlockAudioEncoder(CONFIG, rngs=nnx.Rngs(0)))

    def total(params, features):
        local, overall = merge(graphdef, params)(features)
        return jnp.sum(jnp.sin(local)) + jnp.sum(jnp.sin(overall))

    slope = jax.jit(jax.grad(total))
    heard = jax.random.normal(jax.random.key(0), (1, 1, 12, 2, 6))
    norms = [optax.global_norm(slope(params, x)) for x in (jnp.zeros_like(heard), heard)]
    assert norms[0] < 5 * norms[1]


def test_pose_and_latent_channels_must_agree():
    with pytest.raises(ValueError, match="pose_channels 8 must equal latent_channels 4"):
        PortraitDiT(CONFIG.replace(pose_channels=8), rngs=nnx.Rngs(0))

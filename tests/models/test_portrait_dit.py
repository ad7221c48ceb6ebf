import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from jax_avatar.models.network import Network
from jax_avatar.models.portrait_dit import PortraitDiT
from jax_avatar.models.speech.tokens import (
    EARLIER_FRAMES,
    CausalAudioEncoder,
    NormalisedAudioEncoder,
)
from jax_avatar.testing import NANO

CONFIG = NANO.replace(audio_history=1, framepack=False)


KEY = jax.random.key(3)


@pytest.mark.parametrize("encoder", [CausalAudioEncoder, NormalisedAudioEncoder])
def test_audio_tokens_depend_on_a_block_or_on_a_little_of_the_time_before_it(encoder):
    """Of three blocks, the second begins at video frame 12."""
    made, heard = encoder(CONFIG, rngs=nnx.Rngs(0)), jax.random.normal(KEY, (2, 1, 36, 2, 6))
    encode, by_block = jax.jit(made.__call__), jax.jit(made.by_block)

    def changed(tokens, frame):
        pairs = zip(tokens(heard), tokens(heard.at[:, :, frame].add(1.0)), strict=True)
        sizes = [np.abs(a - b).reshape(2, 9, -1).max((0, 2)) for a, b in pairs]
        return np.flatnonzero(np.maximum(*sizes)).tolist()

    assert [changed(by_block, frame) for frame in (6, 7, 11)] == [[1, 2], [1, 2], [2]]
    assert [changed(encode, frame) for frame in (6, 7, 11)] == [[1, 2], [1, 2, 3], [2, 3, 4]]
    # Eight frames of the past are history enough.
    whole, cut = encode(heard), encode(heard[:, :, 12 - EARLIER_FRAMES :])
    for a, b in zip(whole, cut, strict=True):
        np.testing.assert_allclose(a[:, :, 3:], b[:, :, 2:], atol=1e-6)


def test_dropped_speech_does_not_blow_up_the_gradient():
    """Dropped speech is zeros, and a norm of nothing but zeros multiplies gradients by 1000."""
    network = Network.of(NormalisedAudioEncoder(CONFIG, rngs=nnx.Rngs(0)))
    params = network.params

    def total(params, features):
        local, overall = network.bind(params)(features)
        return jnp.sum(jnp.sin(local)) + jnp.sum(jnp.sin(overall))

    slope = jax.jit(jax.grad(total))
    heard = jax.random.normal(jax.random.key(0), (1, 1, 12, 2, 6))
    norms = [optax.global_norm(slope(params, x)) for x in (jnp.zeros_like(heard), heard)]
    assert norms[0] < 5 * norms[1]


def test_the_velocity_is_that_of_the_prediction_down_to_the_smallest_level():
    dit, low = PortraitDiT(CONFIG, rngs=nnx.Rngs(0)), PortraitDiT.smallest_sigma
    out, noisy, pose = jax.random.normal(KEY, (3, 1, 3, 4, 4, 4))
    for sigma, is_exact in ((1.0, True), (low, True), (low / 2, False)):
        velocity = dit.velocity(out, noisy, jnp.full((1, 3), 1000 * sigma), pose)
        error = np.abs(noisy - sigma * velocity - (pose + out)).max()
        assert (error < 1e-4) == is_exact
    with pytest.raises(ValueError, match=r"the sampler asks PortraitDiT for noise level 0\.05"):
        PortraitDiT.check_level("the sampler", low / 2)


def test_pose_and_latent_channels_must_agree():
    with pytest.raises(ValueError, match="pose_channels 8 must equal latent_channels 4"):
        PortraitDiT(CONFIG.replace(pose_channels=8), rngs=nnx.Rngs(0))

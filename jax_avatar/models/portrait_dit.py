"""The transformer of the small model: it predicts what differs from the portrait.

    pose input = portrait latent at every frame
    network -> difference;  clean = portrait + difference;  velocity = (noisy - clean) / sigma

A network of a few million weights cannot carry both the noise and the portrait through its
width, which a velocity asks of it. Predicting the clean latent as a change of the portrait leaves
all of it for motion. From outside it is a `DiT`: the same arguments come, the velocity goes.
"""

import jax.numpy as jnp
from flax import nnx

from jax_avatar.models.config import DiTConfig
from jax_avatar.models.dit import DiT
from jax_avatar.models.speech.tokens import NormalisedAudioEncoder
from jax_avatar.shapes import Array, Float, Latent

__all__ = ["PortraitDiT"]


class PortraitDiT(DiT):
    """A `DiT` whose pose input is the portrait's latent, repeated over the frames.

    Source: predicting the clean signal under a velocity loss, "Back to Basics: Let Denoising
    Generative Models Denoise", arXiv 2511.13720; the portrait as a base is this project's.
    """

    # Below, the division by sigma would amplify what the network cannot know.
    smallest_sigma = 0.1

    def __init__(self, config: DiTConfig, *, rngs: nnx.Rngs):
        if config.pose_channels != config.latent_channels:
            raise ValueError(
                f"pose_channels {config.pose_channels} must equal latent_channels "
                f"{config.latent_channels}: the pose input is the portrait's latent."
            )
        super().__init__(config, rngs=rngs)
        self.audio = NormalisedAudioEncoder(config, rngs=rngs)

    def velocity(
        self, out: Latent, noisy: Latent, timestep: Float[Array, "b t"], pose: Latent
    ) -> Latent:
        """The predicted change of the portrait -> velocity; arguments as in `DiT.velocity`."""
        sigma = jnp.maximum(timestep.astype(jnp.float32) / 1000, self.smallest_sigma)
        clean = pose.astype(jnp.float32) + out.astype(jnp.float32)
        velocity = (noisy.astype(jnp.float32) - clean) / sigma[:, :, None, None, None]
        return velocity.astype(noisy.dtype)

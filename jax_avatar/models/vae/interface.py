"""The interface that all video VAEs share, which streams, data and scores use."""

from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from jax_avatar.shapes import Latent, Video

__all__ = ["VideoVAE"]


class VideoVAE(nnx.Module):
    """A causal video VAE: `1 + 4 (n - 1)` frames <-> `n` latents; the decoder's state is a value.

    Subclasses have `encode(video)` and `decode_next(state, latent) -> (video, state)`, four frames
    for each latent; their configs `z_dim` and `latent_grid(height, width)`. What depends on the
    portrait is here, for VAEs whose latents hold the whole picture, with a `decode_first(latent)`.
    """

    def encode_still(self, portrait: Float[Array, "b 1 H W 3"], latents: int) -> Latent:
        """Latents of portraits that stand still.

        Args:
            portrait: in [-1, 1].
            latents: how many.
        """
        frames = 1 + 4 * (latents - 1)
        return self.encode(jnp.broadcast_to(portrait, (len(portrait), frames, *portrait.shape[2:])))

    def encode_clip(self, portrait: Float[Array, "b H W 3"], video: Video) -> Latent:
        """Latents of clips, whose portraits are known.

        Args:
            portrait: in [-1, 1].
            video: `1 + 4 n` frames.
        """
        del portrait
        return self.encode(video)

    def start(
        self, portrait: Float[Array, "b 1 H W 3"], latent: Float[Array, "b 1 h w c"]
    ) -> tuple[Float[Array, "b 1 H W 3"], Any]:
        """Starts decoding behind the first latent of clips.

        Args:
            portrait: in [-1, 1].
            latent: that stands for the first frame.

        Returns:
            The first frame, and the state for `decode_next`.
        """
        del portrait
        return self.decode_first(latent)

"""Injection of audio tokens into the tokens of the transformer, frame by frame.

local tokens: keys and values of a cross-attention;  global token: its AdaLN
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx

from jax_avatar.models.attention import Attention, attend
from jax_avatar.models.config import DiTConfig
from jax_avatar.models.layers import layer_at, layer_norm, linear, modulate
from jax_avatar.models.sharding import gathered
from jax_avatar.models.speech.tokens import AudioTokens
from jax_avatar.models.tap import tap, tap_prefix
from jax_avatar.shapes import Array, Float, IntScalar

__all__ = ["AudioInjector", "make_injection"]

_ADALN_EPS = 1e-5


class AudioInjector(nnx.Module):
    """Adds one frame's audio to that frame's tokens: AdaLN, then cross-attention."""

    def __init__(self, config: DiTConfig, *, rngs: nnx.Rngs):
        self.adaln = linear(
            config, config.width, 2 * config.width, zero=config.zero_init, rngs=rngs
        )
        self.attention = Attention(config, zero_out=config.zero_init, rngs=rngs)

    def __call__(
        self,
        x: Float[Array, "b n d"],
        audio: AudioTokens,
        speaker_mask: Float[Array, "b u n"] | None,
    ) -> Float[Array, "b n d"]:
        """Audio injection into noisy tokens `x` of whole frames.

        Args:
            x: hidden states of the noisy tokens, frame-major.
            audio: local and global tokens of the same latent frames.
            speaker_mask: how much of each speaker reaches each token; needed for several.
        """
        local, overall = audio
        b, u, t = overall.shape[:3]
        shift, scale = jnp.split(self.adaln(jax.nn.silu(overall)).astype(jnp.float32), 2, -1)
        frames = rearrange(x, "b (t n) d -> b 1 t n d", t=t)
        frames = jnp.broadcast_to(frames, (b, u, *frames.shape[2:]))
        frames = modulate(layer_norm(frames, _ADALN_EPS), shift[..., None, :], scale[..., None, :])
        frames = rearrange(frames, "b u t n d -> (b u t) n d").astype(x.dtype)
        key, value = self.attention.project_key_value(
            rearrange(local, "b u t k d -> (b u t) k d").astype(x.dtype)
        )
        added = attend(self.attention.project_query(frames), key, value)
        added = self.attention.project_out(added)
        tap("adain", frames)
        tap("out", added)
        added = rearrange(added, "(b u t) n d -> b u (t n) d", b=b, u=u)
        if speaker_mask is not None:
            added = added * speaker_mask[..., None].astype(added.dtype)
        return added.sum(1)


def make_injection(
    injectors: AudioInjector,
    config: DiTConfig,
    tokens: AudioTokens,
    speaker_mask: Float[Array, "b u mask_t h2 w2"] | None,
) -> Callable[[Array, IntScalar | int], Array]:
    """Returns `(noisy tokens, layer) -> noisy tokens`, with audio where the layer injects it.

    Args:
        injectors: of the injecting layers, stacked.
        config: size of the transformer.
        tokens: audio tokens of the noisy frames.
        speaker_mask: how much of each speaker reaches each token, as many frames or more.

    Raises:
        ValueError: several speakers, and no mask.
    """
    b, speakers, t = tokens[1].shape[:3]
    mask = None
    if speaker_mask is not None:
        mask = speaker_mask[:, :, :t].reshape(b, speakers, -1)
    elif speakers > 1:
        raise ValueError(
            f"audio features of {speakers} speakers came without a speaker mask; pass "
            "speaker_mask [b u t h/2 w/2] or the features of one speaker."
        )
    layers = config.audio_inject_layers
    slot_of_layer = [layers.index(i) if i in layers else -1 for i in range(config.num_layers)]
    structure, state = nnx.split(injectors)

    def inject(x, index):
        if isinstance(index, int):  # layers are being visited one by one
            slot = slot_of_layer[index]
            if slot < 0:
                return x
            injector = nnx.merge(structure, layer_at(state, slot))
            with tap_prefix(f"injector{slot}_"):
                return x + injector(x, tokens, mask).astype(x.dtype)

        slot = jnp.asarray(slot_of_layer)[index]

        def added(x):
            own = gathered(layer_at(state, slot), "injectors", len(layers))
            injector = nnx.merge(structure, own)
            return x + injector(x, tokens, mask).astype(x.dtype)

        if min(slot_of_layer) >= 0:
            return added(x)
        return jax.lax.cond(slot >= 0, added, lambda x: x, x)

    return inject

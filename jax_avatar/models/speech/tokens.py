"""Speech features -> audio tokens of the transformer, by causal convolutions.

features [b u T k a] --mix--> [.. T a] --causal convolutions, time / 4--> local and global tokens
"""

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx

from jax_avatar.models.config import DiTConfig
from jax_avatar.models.layers import layer_norm, linear
from jax_avatar.models.tap import is_recording, tap
from jax_avatar.shapes import Array, AudioFeatures, Float

__all__ = [
    "AUDIO_CONTEXTS",
    "EARLIER_FRAMES",
    "AudioTokens",
    "CausalAudioEncoder",
    "NormalisedAudioEncoder",
]

AUDIO_CONTEXTS = ("block_reset", "clip")
"""What the convolutions see before a block: its first feature repeated, or the clip before it."""

EARLIER_FRAMES = 8
"""Video frames before a block that its audio tokens depend on (five), as whole latents."""

AudioTokens = tuple[Array, Array]
"""Local `[b u t tokens d]` and global `[b u t d]` audio tokens per latent frame."""

_FRAMES_PER_LATENT = 4


class _CausalConv(nnx.Module):
    """Width-3 convolution over time; the first element stands for everything before it."""

    def __init__(self, config: DiTConfig, inputs: int, outputs: int, stride: int, *, rngs):
        self.stride = stride
        init = nnx.initializers.lecun_normal()
        self.kernel = nnx.Param(init(rngs.params(), (3, inputs, outputs), config.param_dtype))
        # Not zero: of dropped speech, which is zeros, norms would see nothing but zeros, and their
        # gradient would be a thousand times too large.
        limit = (3 * inputs) ** -0.5
        bias = jax.random.uniform(rngs.params(), (outputs,), config.param_dtype, -limit, limit)
        self.bias = nnx.Param(bias)

    def __call__(self, x: Float[Array, "b T a"]) -> Float[Array, "b S o"]:
        padded = jnp.concatenate([x[:, :1], x[:, :1], x], axis=1)
        y = jax.lax.conv_general_dilated(
            padded,
            self.kernel[...].astype(jnp.float32),
            (self.stride,),
            "VALID",
            dimension_numbers=("NWC", "WIO", "NWC"),
        )
        return y + self.bias[...].astype(jnp.float32)[None, None]


class CausalAudioEncoder(nnx.Module):
    """Hidden states of a speech encoder -> audio tokens per latent frame, all in float32."""

    def __init__(self, config: DiTConfig, *, rngs: nnx.Rngs):
        d, quarter = config.width, config.width // 4
        self.config = config
        self.mix = nnx.Param(jnp.full(config.audio_layers, 0.01, config.param_dtype))
        self.pad_token = nnx.Param(jnp.zeros(d, config.param_dtype))
        tokens = config.num_audio_tokens
        self.local_in = _CausalConv(config, config.audio_width, tokens * quarter, 1, rngs=rngs)
        self.global_in = _CausalConv(config, config.audio_width, quarter, 1, rngs=rngs)
        self.conv2 = _CausalConv(config, quarter, d // 2, 2, rngs=rngs)
        self.conv3 = _CausalConv(config, d // 2, d, 2, rngs=rngs)
        self.global_out = linear(config, d, d, dtype=jnp.float32, rngs=rngs)

    def __call__(self, features: AudioFeatures) -> AudioTokens:
        """Tokens of the latent frames; the first feature stands for the history.

        Args:
            features: four video frames for every latent frame.
        """
        # The official code repeats the first frame `audio_history` times and drops what comes
        # of it. A repeated frame gives repeated outputs, so any history of the same phase does.
        history = 1 + (self.config.audio_history - 1) % _FRAMES_PER_LATENT
        features = jnp.concatenate([features[:, :, :1]] * history + [features], axis=2)
        local, overall = self.encode(features)
        dropped = -(-history // _FRAMES_PER_LATENT)
        return local[:, :, dropped:], overall[:, :, dropped:]

    def by_block(self, features: AudioFeatures) -> AudioTokens:
        """Tokens of the latent frames, every block's from its own features alone.

        Its first feature stands for the history, as in a stream, which encodes block by block.

        Args:
            features: four video frames for every latent frame, whole blocks.
        """
        frames = 4 * self.config.frames_per_block
        if features.shape[2] % frames:
            raise ValueError(
                f"speech features of {features.shape[2]} video frames are no whole number of "
                f"blocks; pass a multiple of {frames} frames, or audio_context='clip'."
            )
        b = features.shape[0]
        local, overall = self(rearrange(features, "b u (g T) k a -> (b g) u T k a", T=frames))
        return (
            rearrange(local, "(b g) u t k d -> b u (g t) k d", b=b),
            rearrange(overall, "(b g) u t d -> b u (g t) d", b=b),
        )

    def of_frames(self, features: AudioFeatures, frames: int, context: str) -> AudioTokens:
        """Tokens of some latent frames.

        Args:
            features: of their video frames, and, if there are more, of `EARLIER_FRAMES` before.
            frames: latent frames.
            context: one of `AUDIO_CONTEXTS`.

        Raises:
            ValueError: the features cover another time.
        """
        if features.shape[2] - 4 * frames not in (0, EARLIER_FRAMES):
            raise ValueError(
                f"audio features cover {features.shape[2]} video frames; {frames} latent frames "
                f"need {4 * frames}, or {EARLIER_FRAMES} more before them. Pass four feature "
                "frames per latent frame."
            )
        if is_recording():
            # Other code keeps the outputs of the repeated history; make them for comparison.
            repeated = [features[:, :, :1]] * self.config.audio_history
            local, overall = self.encode(jnp.concatenate([*repeated, features], axis=2))
            tap("audio_local", local)
            tap("audio_global", overall)
        encode = self.by_block if context == "block_reset" else self
        return jax.tree.map(lambda tokens: tokens[:, :, -frames:], encode(features))

    def encode(self, features: AudioFeatures) -> AudioTokens:
        """Tokens of all features, a quarter as many (rounded up), nothing added or dropped."""
        b, u = features.shape[:2]
        weight = jax.nn.silu(self.mix[...].astype(jnp.float32))
        weight = weight / weight.sum()
        x = jnp.einsum("buTka,k->buTa", features.astype(jnp.float32), weight)
        x = rearrange(x, "b u T a -> (b u) T a")

        tokens = self.config.num_audio_tokens
        local = rearrange(self.local_in(x), "v T (k d) -> (v k) T d", k=tokens)
        local = rearrange(self._tower(local), "(b u k) t d -> b u t k d", b=b, u=u, k=tokens)
        pad = self.pad_token[...].astype(jnp.float32)[None, None, None, None]
        pad = jnp.broadcast_to(pad, (*local.shape[:3], 1, local.shape[-1]))

        overall = self.global_out(self._tower(self.global_in(x)))
        overall = rearrange(overall, "(b u) t d -> b u t d", b=b)
        return jnp.concatenate([local, pad], axis=3), overall

    def _tower(self, x: Array) -> Array:
        def active(y):
            return jax.nn.silu(layer_norm(y, self.config.eps))

        return active(self.conv3(active(self.conv2(active(x)))))


class NormalisedAudioEncoder(CausalAudioEncoder):
    """Audio tokens of normalised features: a residual encoder's grow from layer to layer."""

    def __call__(self, features: AudioFeatures) -> AudioTokens:
        """Tokens of the latent frames; see `CausalAudioEncoder`."""
        return super().__call__(layer_norm(features, self.config.eps))

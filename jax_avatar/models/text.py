"""The prompt encoder: UMT5's encoder half, run once per prompt and never inside the stream.

token ids --embedding--> [norm, attention + position bias, norm, gated GELU] x layers --> norm
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jax_avatar.models.config import UMT5Config
from jax_avatar.models.layers import RMSNorm, layer_at, linear, stack_layers
from jax_avatar.models.tap import is_recording, tap
from jax_avatar.shapes import Array, Float, Int, TextStates

__all__ = ["UMT5Block", "UMT5Encoder", "padded_length", "position_buckets"]

PositionBias = Float[Array, "1 m p p"]

_PADDED_LENGTHS = (64, 128, 256, 512)


def padded_length(num_tokens: int) -> int:
    """Length to pad a prompt to, one of a few, so that few shapes are compiled.

    Padding changes nothing: padded keys are masked and positions are relative.
    """
    return next((length for length in _PADDED_LENGTHS if length >= num_tokens), num_tokens)


def position_buckets(
    offset: Int[np.ndarray, "*n"], num_buckets: int, max_distance: int
) -> Int[np.ndarray, "*n"]:
    """Number of the bias that a relative position shares with its like.

    A quarter of the buckets hold one distance each and a quarter ever wider ranges; the other half
    is the same again for keys after the query.

    Args:
        offset: position of the key minus that of the query.
        num_buckets: as in the config.
        max_distance: as in the config.

    Source: Raffel et al., "T5", arXiv 1910.10683, relative position embeddings.
    """
    half = num_buckets // 2
    single = half // 2
    # Bucket single + k starts at d with log(d / single) / log(max / single) = k / single. Compared
    # in whole numbers: logarithms in float32 may fall on either side of a threshold.
    starts = list(range(single + 1))
    while len(starts) < half:
        k, distance = len(starts) - single, starts[-1]
        while distance**single * single**k < max_distance**k * single**single:
            distance += 1
        starts.append(distance)
    side = np.searchsorted(np.array(starts), np.abs(offset), side="right") - 1
    return (side + half * (offset > 0)).astype(np.int32)


class UMT5Block(nnx.Module):
    """Self-attention with a position bias of its own, then a gated feed-forward layer."""

    def __init__(self, config: UMT5Config, *, rngs: nnx.Rngs):
        d, heads = config.width, config.num_heads * config.head_dim

        def matrix(inputs: int, outputs: int) -> nnx.Linear:
            return linear(config, inputs, outputs, bias=False, rngs=rngs)

        self.config = config
        self.norm_attention = RMSNorm(d, config.eps, config.param_dtype)
        self.query = matrix(d, heads)
        self.key = matrix(d, heads)
        self.value = matrix(d, heads)
        self.out = matrix(heads, d)
        table = (config.num_buckets, config.num_heads)
        self.position = nnx.Param(0.1 * jax.random.normal(rngs.params(), table, config.param_dtype))
        self.norm_ffn = RMSNorm(d, config.eps, config.param_dtype)
        self.ffn_gate = matrix(d, config.ffn_width)
        self.ffn_in = matrix(d, config.ffn_width)
        self.ffn_out = matrix(config.ffn_width, d)

    def position_bias(self, length: int) -> PositionBias:
        """Additive bias of the scores `[1, heads, query, key]` of `length` tokens."""
        config, place = self.config, np.arange(length)
        buckets = position_buckets(
            place[None, :] - place[:, None], config.num_buckets, config.max_distance
        )
        table = self.position[...].astype(config.dtype)
        return jnp.moveaxis(table[buckets], -1, 0)[None]

    def __call__(self, x: Float[Array, "b p d"], mask: Int[Array, "b p"]) -> Float[Array, "b p d"]:
        """One layer; keys where `mask` is 0 are not seen."""
        normed = self.norm_attention(x)
        query, key, value = (self._split(f(normed)) for f in (self.query, self.key, self.value))
        seen = jax.nn.dot_product_attention(
            query,
            key,
            value,
            bias=self.position_bias(x.shape[1]),
            mask=mask[:, None, None, :] > 0,
            scale=1.0,  # T5 folds the usual 1/sqrt(e) into its weights
        )
        x = x + self.out(seen.reshape(*x.shape[:2], -1))
        normed = self.norm_ffn(x)
        gate = jax.nn.gelu(self.ffn_gate(normed), approximate=True)
        return x + self.ffn_out(self.ffn_in(normed) * gate)

    def _split(self, x: Array) -> Array:
        return x.reshape(*x.shape[:-1], self.config.num_heads, self.config.head_dim)


class UMT5Encoder(nnx.Module):
    """Token ids -> states."""

    def __init__(self, config: UMT5Config, *, rngs: nnx.Rngs):
        self.config = config
        table = (config.vocab_size, config.width)
        self.embedding = nnx.Param(jax.random.normal(rngs.params(), table, config.param_dtype))
        self.blocks = stack_layers(lambda r: UMT5Block(config, rngs=r), config.num_layers, rngs)
        self.norm = RMSNorm(config.width, config.eps, config.param_dtype)

    def __call__(self, ids: Int[Array, "b p"], mask: Int[Array, "b p"]) -> TextStates:
        """States of every token, those of padding included; they mean nothing, drop them.

        Args:
            ids: of tokens, below `vocab_size`.
            mask: 1 at tokens, 0 at padding; at least one token per row.
        """
        x = self.embedding[...][ids].astype(self.config.dtype)
        structure, state = nnx.split(self.blocks)
        if not is_recording():

            def layer(x, state):
                return nnx.merge(structure, state)(x, mask), None

            x, _ = jax.lax.scan(layer, x, state, unroll=self.config.unroll)
            return self.norm(x)
        for index in range(self.config.num_layers):
            x = nnx.merge(structure, layer_at(state, index))(x, mask)
            tap(f"block{index}_out", x)
        return self.norm(x)

    def position_bias(self, layer: int, length: int) -> PositionBias:
        """Additive bias of a layer's scores `[1, heads, query, key]` of `length` tokens."""
        structure, state = nnx.split(self.blocks)
        return nnx.merge(structure, layer_at(state, layer)).position_bias(length)

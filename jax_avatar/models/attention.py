"""Attention behind one function, so that a backend's kernel is chosen in one place."""

import jax
import jax.numpy as jnp
from flax import nnx

from jax_avatar.models.layers import RMSNorm
from jax_avatar.models.quantise import projection
from jax_avatar.shapes import Array, Float, IntScalar, Tokens

__all__ = ["Attention", "attend", "block_causal_mask"]

Heads = Float[Array, "b n m e"]


def attend(
    query: Float[Array, "b n m e"],
    key: Float[Array, "b s m e"],
    value: Float[Array, "b s m e"],
    *,
    mask: Array | None = None,
    key_length: IntScalar | None = None,
) -> Float[Array, "b n m e"]:
    """Softmax attention, scale `1/sqrt(e)`.

    Args:
        query: queries, rotated.
        key: keys, rotated.
        value: values.
        mask: boolean `[n, s]`, true where a query sees a key; everything if not given.
        key_length: only the first so many keys are seen.
    """
    lengths = None
    if key_length is not None:
        lengths = jnp.broadcast_to(key_length, (query.shape[0],)).astype(jnp.int32)
    if mask is not None:
        mask = mask[None, None]
    return jax.nn.dot_product_attention(query, key, value, mask=mask, key_value_seq_lengths=lengths)


def block_causal_mask(num_noisy: int, num_cond: int, block_tokens: int) -> Array:
    """Who sees whom in the block-causal training form.

    Noisy tokens see their own and earlier blocks, and all conditioning tokens; conditioning
    tokens see only each other.

    Args:
        num_noisy: noisy tokens, whole frames; the last block may be short.
        num_cond: reference and motion tokens behind them.
        block_tokens: tokens of a full block.

    Returns:
        Boolean `[query, key]`.
    """
    index = jnp.arange(num_noisy + num_cond)
    is_cond = index >= num_noisy
    block = index // block_tokens
    earlier = (block[None, :] <= block[:, None]) & ~is_cond[:, None] & ~is_cond[None, :]
    return earlier | is_cond[None, :]


class Attention(nnx.Module):
    """Projections with normalised queries and keys; positions and caches are the caller's."""

    def __init__(self, config, *, zero_out: bool = False, rngs: nnx.Rngs):
        self.heads = (config.num_heads, config.head_dim)
        d = config.width
        self.query = projection(config, d, d, rngs=rngs)
        self.key = projection(config, d, d, rngs=rngs)
        self.value = projection(config, d, d, rngs=rngs)
        self.out = projection(config, d, d, zero=zero_out, rngs=rngs)
        self.norm_query = RMSNorm(d, config.eps, config.param_dtype)
        self.norm_key = RMSNorm(d, config.eps, config.param_dtype)

    def project_query(self, x: Tokens) -> Heads:
        """Normalised queries; the norm runs over the full width, before the split into heads."""
        return self._split(self.norm_query(self.query(x)))

    def project_key_value(self, x: Float[Array, "b s d"]) -> tuple[Array, Array]:
        """Normalised keys, and values, `[b s m e]` each."""
        return self._split(self.norm_key(self.key(x))), self._split(self.value(x))

    def project_out(self, x: Heads) -> Tokens:
        """Joins the heads."""
        return self.out(x.reshape(*x.shape[:-2], -1))

    def _split(self, x: Array) -> Array:
        return x.reshape(*x.shape[:-1], *self.heads)

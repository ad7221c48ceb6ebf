"""Attention behind one function, so that a backend's kernel is chosen in one place."""

import contextlib
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.experimental.pallas.ops.tpu.splash_attention import (
    splash_attention_kernel,
    splash_attention_mask,
)
from jax.sharding import PartitionSpec

from jax_avatar.models.config import ATTENTION_KERNELS
from jax_avatar.models.layers import RMSNorm
from jax_avatar.models.quantise import projection
from jax_avatar.models.sharding import constrain
from jax_avatar.shapes import Array, Float, IntScalar, Tokens

__all__ = ["Attention", "attend", "block_causal_mask", "choose_kernel"]

Heads = Float[Array, "b n m e"]

_BY_BACKEND = {"gpu": "cudnn", "tpu": "splash"}
_LANES = 128  # of a TPU's vector unit
_MAX_TILE = 1024
_CHUNK = 128  # queries of which "chunked" attention holds the scores


def attend(
    query: Float[Array, "b n m e"],
    key: Float[Array, "b s m e"],
    value: Float[Array, "b s m e"],
    *,
    mask: Array | None = None,
    key_length: IntScalar | None = None,
    kernel: str = "auto",
) -> Float[Array, "b n m e"]:
    """Softmax attention, scale `1/sqrt(e)`.

    Args:
        query: queries, rotated.
        key: keys, rotated.
        value: values.
        mask: boolean `[n, s]`, true where a query sees a key; everything if not given.
        key_length: only the first so many keys are seen.
        kernel: one of `ATTENTION_KERNELS`, see `choose_kernel`.
    """
    lengths = None
    if key_length is not None:
        lengths = jnp.broadcast_to(key_length, (query.shape[0],)).astype(jnp.int32)
    kernel = choose_kernel(kernel, query, key, has_mask=mask is not None)
    if kernel == "splash":
        if lengths is None:
            lengths = jnp.full(query.shape[0], key.shape[1], jnp.int32)
        return _over_heads(_splash)(query, key, value, lengths)
    if mask is not None:
        mask = mask[None, None]
    if kernel in ("xla", "chunked"):
        if lengths is not None:
            seen = (jnp.arange(key.shape[1])[None] < lengths[:, None])[:, None, None]
            mask = seen if mask is None else mask & seen
        return {"xla": _plain, "chunked": _chunked}[kernel](query, key, value, mask)

    def cudnn(query, key, value, lengths):
        return jax.nn.dot_product_attention(
            query, key, value, mask=mask, key_value_seq_lengths=lengths, implementation="cudnn"
        )

    return _over_heads(cudnn)(query, key, value, lengths)


def choose_kernel(kernel: str, query: Array, key: Array, *, has_mask: bool = False) -> str:
    """Kernel of this attention: the requested one, or "xla" where it does not apply.

    A few keys, as of the audio injection, are faster without a kernel. cuDNN wants half precision
    and heads of at most 128 channels, splash attention heads of whole vector lanes and no mask
    that is known only when running: with one it is "chunked", since training has long clips.

    Args:
        kernel: "auto" is cuDNN on GPUs, splash attention on TPUs, XLA elsewhere.
        query: `[b n m e]`; only shape and type are looked at.
        key: `[b s m e]`, likewise.
        has_mask: whether a mask of queries and keys is given.

    Raises:
        ValueError: an unknown kernel.
    """
    if kernel not in ATTENTION_KERNELS:
        raise ValueError(
            f"attention {kernel!r} is unknown; choose one of {', '.join(ATTENTION_KERNELS)}."
        )
    if kernel == "auto":
        kernel = _BY_BACKEND.get(jax.default_backend(), "xla")
    keys, size = key.shape[1], query.shape[-1]
    if keys < _LANES:
        return "xla"
    if kernel == "cudnn":
        halves = all(x.dtype in (jnp.bfloat16, jnp.float16) for x in (query, key))
        return "cudnn" if halves and size <= 128 and size % 8 == 0 else "xla"
    if kernel == "splash":
        if has_mask:
            return "chunked"
        return "splash" if size % _LANES == 0 else "xla"
    return kernel


def _plain(query: Heads, key: Array, value: Array, mask: Array | None) -> Heads:
    """Attention in products and sums; scores, their maximum and their sum are float32.

    On a CPU, `jax.nn.dot_product_attention` takes more than twice as long over the window's length,
    since it does not put the heads first and masks the scores in a pass of its own.
    """
    head_size, dtype = query.shape[-1], query.dtype
    query, key, value = (jnp.moveaxis(x, 2, 1) for x in (query, key, value))
    scores = jnp.einsum("bmne,bmse->bmns", query, key, preferred_element_type=jnp.float32)
    if mask is not None:
        scores = jnp.where(mask, scores, -0.7 * np.finfo(np.float32).max)
    largest = jax.lax.stop_gradient(scores.max(-1, keepdims=True))
    weight = jnp.exp((scores - largest) * np.float32(head_size**-0.5))
    total = weight.sum(-1, keepdims=True)
    seen = jnp.einsum(
        "bmns,bmse->bmne", weight.astype(dtype), value, preferred_element_type=jnp.float32
    )
    return jnp.moveaxis(seen / total, 1, 2).astype(dtype)


def _chunked(query: Heads, key: Array, value: Array, mask: Array | None) -> Heads:
    """`_plain` for some queries after others; their scores are made again for the gradient."""
    n = query.shape[1]
    size = min(_CHUNK, n)

    def cut(x, axis):
        pad = [(0, -n % size if i == axis else 0) for i in range(x.ndim)]
        x = jnp.pad(x, pad)
        shape = (*x.shape[:axis], -1, size, *x.shape[axis + 1 :])
        return jnp.moveaxis(x.reshape(shape), axis, 0)

    by_query = mask is not None and mask.shape[2] == n > 1
    parts = (cut(query, 1), cut(mask, 2) if by_query else None)

    @jax.checkpoint
    def some(part):
        query, own = part
        return _plain(query, key, value, own if by_query else mask)

    seen = jnp.moveaxis(jax.lax.map(some, parts), 0, 1)
    return seen.reshape(seen.shape[0], -1, *query.shape[2:])[:, :n]


def _splash(query: Heads, key: Array, value: Array, lengths: Array) -> Heads:
    """JAX's Pallas kernel for TPUs; on a CPU it is interpreted, for tests."""

    def run(query, key, value, lengths, *, interpret):
        n, s = query.shape[1], key.shape[1]
        block_q, block_kv = _block(n), _block(s)
        # Heads first; the kernel takes whole blocks only, and does not scale.
        query = (query.astype(jnp.float32) / np.sqrt(query.shape[-1])).astype(query.dtype)
        query, key, value = (
            jnp.pad(jnp.moveaxis(x, 2, 1), ((0, 0), (0, 0), (0, -x.shape[1] % block), (0, 0)))
            for x, block in ((query, block_q), (key, block_kv), (value, block_kv))
        )
        shape = (query.shape[2], key.shape[2])
        kernel = splash_attention_kernel.make_splash_mha_single_device(
            splash_attention_mask.MultiHeadMask(
                [splash_attention_mask.FullMask(shape)] * query.shape[1]
            ),
            block_sizes=splash_attention_kernel.BlockSizes(
                block_q=block_q,
                block_kv=block_kv,
                block_q_dkv=block_q,
                block_kv_dkv=block_kv,
                block_q_dq=block_q,
                block_kv_dq=block_kv,
            ),
            interpret=interpret,
        )

        def one(query, key, value, length):
            # Segment 0 is what is filled; padding and empty slots are another.
            hidden = (jnp.arange(shape[1]) >= length).astype(jnp.int32)
            segments = splash_attention_kernel.SegmentIds(jnp.zeros(shape[0], jnp.int32), hidden)
            return kernel(query, key, value, segments)

        # TPUs refuse float32 precision for products of half precision, instead of ignoring it.
        exact = query.dtype == jnp.float32
        with contextlib.nullcontext() if exact else jax.default_matmul_precision("default"):
            seen = jax.vmap(one)(query, key, value, lengths)
        return jnp.moveaxis(seen, 1, 2)[:, :n]

    # Chosen when lowered, since programs for TPUs are also compiled where there is none.
    return jax.lax.platform_dependent(
        query,
        key,
        value,
        lengths,
        cpu=functools.partial(run, interpret=True),
        default=functools.partial(run, interpret=False),
    )


def _block(length: int) -> int:
    """Largest tile, in whole vector lanes, with the least padding."""
    tiles = range(_LANES, _MAX_TILE + 1, _LANES)
    return min(tiles, key=lambda tile: (-length % tile, -tile))


def _over_heads(function):
    """`function(query, key, value, lengths)` on each device's own heads and, in training, samples.

    Kernels are opaque to the compiler, which cannot split them over the axes of a mesh.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if "model" not in mesh.shape:
        return function

    def run(query, key, value, lengths):
        # Where one sample is left, a `vmap` has the others (see `constrain`).
        axes = [axis for axis in ("replica", "data") if axis in mesh.shape]
        devices = math.prod(mesh.shape[axis] for axis in axes)
        spread = axes and query.shape[0] > 1 and query.shape[0] % devices == 0
        batch = tuple(axes) if spread else None
        heads = PartitionSpec(batch, None, "model")
        return jax.shard_map(
            function,
            in_specs=(heads, heads, heads, PartitionSpec(batch)),
            out_specs=heads,
            axis_names={"model", *axes},
            check_vma=False,
        )(query, key, value, lengths)

    return run


def block_causal_mask(
    num_noisy: int, num_cond: int, block_tokens: int, past_blocks: int | None = None
) -> Array:
    """Attention mask of the block-causal training form.

    Noisy tokens see their own and earlier blocks, and all conditioning tokens; conditioning
    tokens see only each other.

    Args:
        num_noisy: noisy tokens, whole frames; the last block may be short.
        num_cond: reference and motion tokens behind them.
        block_tokens: tokens of a full block.
        past_blocks: earlier blocks that a block sees; all if not given.

    Returns:
        Boolean `[query, key]`.
    """
    index = jnp.arange(num_noisy + num_cond)
    is_cond = index >= num_noisy
    block = index // block_tokens
    distance = block[:, None] - block[None, :]
    earlier = (distance >= 0) & ~is_cond[:, None] & ~is_cond[None, :]
    if past_blocks is not None:
        earlier &= distance <= past_blocks
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
        return constrain(x.reshape(*x.shape[:-1], *self.heads), ..., None, "model")

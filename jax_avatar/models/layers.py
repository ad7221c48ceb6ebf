"""Norms, modulation and patch projections of the transformer; statistics in float32."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx

from jax_avatar.shapes import Array, Float, IntScalar, PyTree

__all__ = [
    "AdaptedLinear",
    "Adapter",
    "LayerNorm",
    "PatchProjection",
    "RMSNorm",
    "TimeEmbedding",
    "layer_at",
    "layer_norm",
    "linear",
    "modulate",
    "patchify",
    "stack_layers",
    "unpatchify",
]

_NORMAL = nnx.initializers.normal(0.02)


def stack_layers(build: Callable[[nnx.Rngs], nnx.Module], count: int, rngs: nnx.Rngs) -> nnx.Module:
    """`count` modules with their parameters stacked along a leading axis, for a scan."""

    @nnx.split_rngs(splits=count)
    @nnx.vmap(in_axes=0, out_axes=0)
    def make(rngs):
        return build(rngs)

    return make(rngs)


def layer_at(tree: PyTree, index: IntScalar) -> PyTree:
    """One layer's part of stacked arrays."""
    return jax.tree.map(lambda leaf: leaf[index], tree)


def linear(
    config,
    inputs: int,
    outputs: int,
    *,
    dtype=None,
    zero: bool = False,
    bias: bool = True,
    init=None,
    build: Callable[..., nnx.Linear] = nnx.Linear,
    rngs: nnx.Rngs,
) -> nnx.Linear:
    """A linear layer in the types of `config`, Xavier-uniform or zero."""
    init = nnx.initializers.zeros_init() if zero else init or nnx.initializers.xavier_uniform()
    return build(
        inputs,
        outputs,
        use_bias=bias,
        dtype=dtype or config.dtype,
        param_dtype=config.param_dtype,
        kernel_init=init,
        rngs=rngs,
    )


class Adapter(nnx.Module):
    """A low-rank term beside a linear layer, `scaling * (x a) b`; its factors are float32."""

    def __init__(self, config, inputs: int, outputs: int):
        self.scaling, self.dtype = config.adapter_scaling, config.dtype
        self.a = nnx.Param(jnp.zeros((inputs, config.adapter_rank), jnp.float32))
        self.b = nnx.Param(jnp.zeros((config.adapter_rank, outputs), jnp.float32))

    def __call__(self, x: Float[Array, "*n d"], y: Float[Array, "*n o"]) -> Float[Array, "*n o"]:
        """Output `y` of the layer plus the adapter's term, added in float32; in the type of `y`."""
        a, b = (factor[...].astype(self.dtype) for factor in (self.a, self.b))
        term = jnp.dot(jnp.dot(x.astype(self.dtype), a), b).astype(jnp.float32)
        return (y.astype(jnp.float32) + self.scaling * term).astype(y.dtype)


class AdaptedLinear(nnx.Linear):
    """A linear layer with an `Adapter`; the weights are never merged."""

    def __init__(self, config, inputs: int, outputs: int, **options):
        super().__init__(inputs, outputs, **options)
        self.adapter = Adapter(config, inputs, outputs)

    def __call__(self, x: Float[Array, "*n d"], out_sharding=None) -> Float[Array, "*n o"]:
        """`x W + bias + scaling * (x a) b`."""
        return self.adapter(x, super().__call__(x, out_sharding))


def layer_norm(x: Float[Array, "*n d"], eps: float) -> Float[Array, "*n d"]:
    """Layer norm without parameters, in the type of `x`."""
    wide = x.astype(jnp.float32)
    centred = wide - wide.mean(-1, keepdims=True)
    variance = jnp.mean(centred * centred, -1, keepdims=True)
    return (centred * jax.lax.rsqrt(variance + eps)).astype(x.dtype)


def modulate(x: Array, shift: Array, scale: Array) -> Array:
    """`x * (1 + scale) + shift` in float32, the AdaLN of DiT (arXiv 2212.09748)."""
    return x.astype(jnp.float32) * (1 + scale) + shift


class LayerNorm(nnx.Module):
    """Layer norm with scale and bias."""

    def __init__(self, width: int, eps: float, param_dtype):
        self.eps = eps
        self.scale = nnx.Param(jnp.ones(width, param_dtype))
        self.bias = nnx.Param(jnp.zeros(width, param_dtype))

    def __call__(self, x: Float[Array, "*n d"]) -> Float[Array, "*n d"]:
        """Statistics in float32, result in the type of `x`."""
        normed = layer_norm(x, self.eps).astype(jnp.float32)
        return (normed * _wide(self.scale, x) + _wide(self.bias, x)).astype(x.dtype)


class RMSNorm(nnx.Module):
    """Root-mean-square norm over the last axis."""

    def __init__(self, width: int, eps: float, param_dtype):
        self.eps = eps
        self.scale = nnx.Param(jnp.ones(width, param_dtype))

    def __call__(self, x: Float[Array, "*n d"]) -> Float[Array, "*n d"]:
        """Statistics in float32, result in the type of `x`."""
        wide = x.astype(jnp.float32)
        normed = wide * jax.lax.rsqrt(jnp.mean(wide * wide, -1, keepdims=True) + self.eps)
        # The official model rounds before it scales.
        return normed.astype(x.dtype) * self.scale[...].reshape((1,) * (x.ndim - 1) + (-1,)).astype(
            x.dtype
        )


def _wide(param: nnx.Param, x: Array) -> Array:
    return param[...].astype(jnp.float32).reshape((1,) * (x.ndim - 1) + (-1,))


def patchify(x: Float[Array, "b t h w c"], patch: tuple[int, int, int]) -> Float[Array, "b n p"]:
    """Cuts video into non-overlapping patches, frame-major; a remainder is dropped.

    Inside a patch the order is (time, row, column, channel), channel fastest.
    """
    pt, ph, pw = patch
    t, h, w = (size // p * p for size, p in zip(x.shape[1:4], patch, strict=True))
    return rearrange(
        x[:, :t, :h, :w],
        "b (t pt) (h ph) (w pw) c -> b (t h w) (pt ph pw c)",
        pt=pt,
        ph=ph,
        pw=pw,
    )


def unpatchify(
    x: Float[Array, "b n p"], grid: tuple[int, int, int], patch: tuple[int, int, int]
) -> Float[Array, "b t h w c"]:
    """Inverse of `patchify` for a token grid (frames, rows, columns)."""
    (t, h, w), (pt, ph, pw) = grid, patch
    return rearrange(
        x,
        "b (t h w) (pt ph pw c) -> b (t pt) (h ph) (w pw) c",
        t=t,
        h=h,
        w=w,
        pt=pt,
        ph=ph,
        pw=pw,
    )


class PatchProjection(nnx.Module):
    """A convolution whose stride equals its kernel: one linear map per patch."""

    def __init__(
        self, config, channels: int, patch: tuple[int, int, int], *, zero=False, rngs: nnx.Rngs
    ):
        self.patch = patch
        inputs = int(np.prod(patch)) * channels
        self.linear = linear(config, inputs, config.width, zero=zero, rngs=rngs)

    def __call__(self, x: Float[Array, "b t h w c"]) -> Float[Array, "b n d"]:
        """One token per patch."""
        return self.linear(patchify(x, self.patch))


class TimeEmbedding(nnx.Module):
    """Timestep in 0..1000 -> embedding `[d]` and its six modulation rows `[6 d]`, float32."""

    def __init__(self, config, *, rngs: nnx.Rngs):
        d = config.width
        half = config.freq_width // 2
        frequency = 10000.0 ** (-np.arange(half, dtype=np.float64) / half)
        self.frequency = tuple(frequency.tolist())
        self.hidden = linear(config, 2 * half, d, dtype=jnp.float32, init=_NORMAL, rngs=rngs)
        self.out = linear(config, d, d, dtype=jnp.float32, init=_NORMAL, rngs=rngs)
        self.project = linear(config, d, 6 * d, dtype=jnp.float32, rngs=rngs)

    def sinusoid(self, timestep: Float[Array, "*b"]) -> Float[Array, "*b freq"]:
        """Cosines, then sines, of the timestep.

        A float32 product `t * w` is off by 3e-5 at t = 1000, so the whole part of the timestep
        is looked up in a table made in float64 and only the fraction is turned here.
        """
        frequency = np.array(self.frequency)
        angle = np.arange(1001)[:, None] * frequency
        whole = jnp.clip(jnp.floor(timestep), 0, 1000)
        fraction = (timestep - whole)[..., None] * _lead(frequency.astype(np.float32), timestep)
        index = whole.astype(jnp.int32)
        cos = jnp.asarray(np.cos(angle), jnp.float32)[index]
        sin = jnp.asarray(np.sin(angle), jnp.float32)[index]
        part_cos, part_sin = jnp.cos(fraction), jnp.sin(fraction)
        return jnp.concatenate(
            [cos * part_cos - sin * part_sin, sin * part_cos + cos * part_sin], axis=-1
        )

    def __call__(self, timestep: Float[Array, "b t"]) -> tuple[Array, Array]:
        """Embedding and modulation rows of every timestep."""
        embedding = self.out(jax.nn.silu(self.hidden(self.sinusoid(timestep))))
        rows = self.project(jax.nn.silu(embedding))
        return embedding, rows.reshape(*rows.shape[:-1], 6, -1)


def _lead(row: np.ndarray, x: Array) -> np.ndarray:
    return row.reshape((1,) * x.ndim + row.shape)

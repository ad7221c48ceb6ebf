"""Eight-bit weights and activations for the large products of the transformer.

    kernel [in out] -> values in int8 or float8 [in out], one scale per output [out]
    x [n in]        -> values of the same type,           one scale per token  [n 1]
    y = (x_values @ kernel_values) * token scale * output scale + bias

Weights are rounded once, activations in every call. Norms, softmax, modulation and the residual
keep their types.

Source: the published model's own float8 option uses one scale per tensor (Live Avatar repository);
scales per output and per token cost nothing and err less.
"""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jax_avatar.models.layers import AdaptedLinear, Adapter, linear
from jax_avatar.models.lora import is_adapted
from jax_avatar.models.network import flatten, unflatten
from jax_avatar.shapes import Array, Float, PyTree

__all__ = [
    "QuantisedLinear",
    "projection",
    "quantise",
    "quantise_params",
    "quantised_leaves",
]

_TYPES = {"int8": jnp.int8, "fp8": jnp.float8_e4m3fn}
_LARGEST = {"int8": 127.0, "fp8": 448.0}


def quantise(array: Array | np.ndarray, kind: str, axis: int) -> tuple[Array, Array]:
    """Rounds to eight bits with one scale for all values along an axis.

    Args:
        array: any floating-point array, finite.
        kind: "int8" or "fp8" (e4m3).
        axis: that shares a scale.

    Returns:
        Values, and float32 scales with length 1 along `axis`; `values * scales` is near `array`.
    """
    wide = jnp.asarray(array, jnp.float32)
    largest = jnp.max(jnp.abs(wide), axis=axis, keepdims=True)
    scale = jnp.maximum(largest, 1e-12) / _LARGEST[kind]
    values = jnp.clip(wide / scale, -_LARGEST[kind], _LARGEST[kind])
    if kind == "int8":
        values = jnp.round(values)
    return values.astype(_TYPES[kind]), scale


def quantised_leaves(leaves: Mapping[str, Any], kind: str) -> dict[str, Any]:
    """Shapes and types of a transformer's parameters with its large kernels in eight bits."""
    result = {}
    for path, leaf in leaves.items():
        result[path] = leaf
        if is_adapted(path):
            shape = tuple(leaf.shape)
            result[path] = jax.ShapeDtypeStruct(shape, _TYPES[kind])
            result[f"{path}_scale"] = jax.ShapeDtypeStruct((*shape[:-2], shape[-1]), jnp.float32)
    return result


def quantise_params(params: PyTree, kind: str) -> PyTree:
    """A transformer's parameters with its large kernels in eight bits.

    Args:
        params: nested dictionary of floating-point arrays.
        kind: "int8" or "fp8"; give the network's config the same value for `weights`.
    """
    result = {}
    for path, leaf in flatten(params).items():
        if is_adapted(path):
            # Layer by layer: the float32 copy of a stack of the 14B would take 11 GB.
            values, scale = jax.lax.map(lambda k: quantise(k, kind, axis=-2), jnp.asarray(leaf))
            result[path], result[f"{path}_scale"] = values, scale[..., 0, :]
        else:
            result[path] = leaf
    return unflatten(result)


class QuantisedLinear(nnx.Module):
    """A biased linear layer of eight-bit values; the bias keeps the parameters' type."""

    def __init__(self, config, inputs: int, outputs: int):
        self.kind, self.dtype = config.weights, config.dtype
        self.kernel = nnx.Param(jnp.zeros((inputs, outputs), _TYPES[config.weights]))
        self.kernel_scale = nnx.Param(jnp.ones((outputs,), jnp.float32))
        self.bias = nnx.Param(jnp.zeros((outputs,), config.param_dtype))
        self.adapter = Adapter(config, inputs, outputs) if config.adapter_rank else None

    def __call__(self, x: Float[Array, "*n d"]) -> Float[Array, "*n outputs"]:
        """The product in 32 bits, the result in the compute type."""
        values, scale = quantise(x, self.kind, axis=-1)
        exact = jnp.int32 if self.kind == "int8" else jnp.float32
        product = jax.lax.dot_general(
            values,
            self.kernel[...],
            (((x.ndim - 1,), (0,)), ((), ())),
            preferred_element_type=exact,
        ).astype(jnp.float32)
        lead = (1,) * (x.ndim - 1) + (-1,)
        product = product * scale * self.kernel_scale[...].reshape(lead)
        y = (product + self.bias[...].astype(jnp.float32).reshape(lead)).astype(self.dtype)
        return self.adapter(x, y) if self.adapter else y


def projection(config, inputs: int, outputs: int, *, zero: bool = False, rngs: nnx.Rngs):
    """A linear layer inside the transformer's blocks, in the weights that `config` asks for."""
    if config.weights:
        return QuantisedLinear(config, inputs, outputs)
    build = functools.partial(AdaptedLinear, config) if config.adapter_rank else nnx.Linear
    return linear(config, inputs, outputs, zero=zero, build=build, rngs=rngs)

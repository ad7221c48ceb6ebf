"""One layer of the transformer, and all of them in a row."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jax_avatar.models.attention import Attention, attend
from jax_avatar.models.config import DiTConfig
from jax_avatar.models.layers import LayerNorm, layer_at, layer_norm, modulate
from jax_avatar.models.quantise import projection
from jax_avatar.models.sharding import constrain, gathered
from jax_avatar.models.tap import is_recording, tap, tap_prefix
from jax_avatar.shapes import Array, PyTree

__all__ = ["Block", "run_layers"]


class Block(nnx.Module):
    """Self-attention, cross-attention to the prompt and feed-forward, modulated by time."""

    def __init__(self, config: DiTConfig, *, rngs: nnx.Rngs):
        d = config.width
        self.config = config
        self.modulation = nnx.Param(
            jax.random.normal(rngs.params(), (6, d), config.param_dtype) / np.sqrt(d)
        )
        self.self_attention = Attention(config, rngs=rngs)
        self.cross_attention = Attention(config, rngs=rngs)
        self.norm_cross = LayerNorm(d, config.eps, config.param_dtype)
        self.ffn_in = projection(config, d, config.ffn_width, rngs=rngs)
        self.ffn_out = projection(config, config.ffn_width, d, rngs=rngs)

    def __call__(self, x, time_rows, spread, self_attention, text_key, text_value):
        """One layer.

        Args:
            x: hidden states `[b n d]`.
            time_rows: modulation rows of the timesteps, `[b r 6 d]`.
            spread: `[b r d] -> [b n d]`, the row of every token.
            self_attention: `(query, key, value) -> (seen, carry)` with positions and cache.
            text_key, text_value: of the prompt, `[b p m e]`.

        Returns:
            New hidden states, and the carry.
        """
        dtype, eps = x.dtype, self.config.eps
        rows = self.modulation[...].astype(jnp.float32)[None, None] + time_rows
        shift, scale, gate, ffn_shift, ffn_scale, ffn_gate = (
            spread(rows[:, :, i]) for i in range(6)
        )

        attended = modulate(layer_norm(x, eps), shift, scale).astype(dtype)
        tap("selfattn_in", attended)
        attention = self.self_attention
        query = attention.project_query(attended)
        seen, carry = self_attention(query, *attention.project_key_value(attended))
        seen = attention.project_out(seen)
        tap("selfattn_out", seen)
        # Inside a layer the residual is float32, as in the official run.
        x = x.astype(jnp.float32) + gate * seen.astype(jnp.float32)

        prompted = self.norm_cross(x.astype(dtype))
        tap("crossattn_in", prompted)
        attention = self.cross_attention
        kernel = self.config.attention
        prompted = attend(attention.project_query(prompted), text_key, text_value, kernel=kernel)
        prompted = attention.project_out(prompted)
        tap("crossattn_out", prompted)
        x = x + prompted.astype(jnp.float32)

        hidden = modulate(layer_norm(x, eps), ffn_shift, ffn_scale).astype(dtype)
        tap("ffn_in", hidden)
        hidden = constrain(self.ffn_in(hidden), ..., None, "model")
        hidden = self.ffn_out(jax.nn.gelu(hidden, approximate=True))
        tap("ffn_out", hidden)
        x = (x + ffn_gate * hidden.astype(jnp.float32)).astype(dtype)
        tap("out", x)
        return x, carry


def run_layers(
    blocks: Block,
    config: DiTConfig,
    layer: Callable[..., tuple[Array, Any, PyTree]],
    x: Array,
    xs: PyTree,
    carry: PyTree = None,
) -> tuple[Array, PyTree, PyTree]:
    """Runs `layer(x, block, index, xs, carry) -> (x, carry, kept)` over all layers.

    Args:
        blocks: the layers, stacked.
        config: size of the transformer.
        layer: calls a block, with what the form of the network needs around it.
        x: hidden states.
        xs: inputs of the layers, stacked.
        carry: passed from layer to layer.

    Returns:
        The hidden states and the carry after the last layer, and what every layer kept, stacked.
    """
    structure, state = nnx.split(blocks)
    count = config.num_layers

    def body(through, inputs):
        x, carry = through
        index, state, xs = inputs
        # Between layers, tokens are spread over "model"; within, heads are.
        x = constrain(x, "data", "model")
        block = nnx.merge(structure, gathered(state, "blocks", count))
        x, carry, kept = layer(x, block, index, xs, carry)
        return (constrain(x, "data", "model"), carry), kept

    if not is_recording():
        if config.rematerialise:
            body = jax.checkpoint(body)
        scanned = (jnp.arange(count), state, xs)
        (x, carry), kept = jax.lax.scan(body, (x, carry), scanned, unroll=config.unroll)
        return x, carry, kept

    tap("block0_in", x)
    kept = []
    for index in range(count):
        block = nnx.merge(structure, layer_at(state, index))
        with tap_prefix(f"block{index}_"):
            x, carry, here = layer(x, block, index, layer_at(xs, index), carry)
        kept.append(here)
    return x, carry, jax.tree.map(lambda *leaves: jnp.stack(leaves), *kept)

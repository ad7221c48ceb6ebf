"""Keys and values of the past: sink and rolling windows of a stream, history of a rollout.

    key slots:  | sink, rotated anew every call | block | block | block | block |
                  never rolls out                 oldest is overwritten

Filled slots are always a prefix, so attention needs a length and no mask.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_avatar.models.config import DiTConfig
from jax_avatar.models.rope import Rotation, frame_rotation
from jax_avatar.shapes import Array, IntScalar

__all__ = [
    "BlockPosition",
    "History",
    "KVCache",
    "Past",
    "Sink",
    "block_position",
    "empty_cache",
    "frame_table",
    "position_in",
    "sink_frame",
    "write",
]


Past = Callable[[IntScalar], tuple[Array, Array]]
"""Number of a layer -> keys and values of earlier blocks, `[b s m e]` each, filled ones first."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Sink:
    """Keys and values that never roll out, and those of the prompt, for all layers.

    The sink's keys are kept before rotation: where the reference stands relative to the current
    block is decided at every call (Rolling RoPE).

    Attributes:
        groups: kinds of its tokens, in their order: "reference", and "motion" if they are there.
    """

    key: Any  # l b c m e, c sink tokens, not rotated
    value: Any  # l b c m e
    text_key: Any  # l b p m e
    text_value: Any  # l b p m e
    groups: tuple[str, ...] = field(default=("reference",), metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class KVCache:
    """Sink slots, then a rolling window, of one denoising step."""

    key: Any  # l b s m e, rotated
    value: Any  # l b s m e


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class History:
    """Keys and values of the past blocks of a rollout, in slots of whole blocks.

    Block `g` is in slot `g % w`: all blocks of a clip, or a ring of the last ones. Layers only read
    it, one after the other: a window that is carried through them, as in a stream, would be kept
    once per layer for their gradient.

    With an axis of steps in front, every denoising step has a ring of its own.
    """

    key: Any  # w l b n m e, or i w l b n m e; rotated
    value: Any

    @classmethod
    def empty(cls, slots: tuple[int, ...], block: tuple[int, ...], dtype: Any) -> "History":
        """A history with nothing in it.

        Args:
            slots: their number, after that of the steps if each has its own.
            block: shape of a block's keys, `l b n m e`.
            dtype: of the numbers.
        """
        zeros = jnp.zeros((*slots, *block), dtype)
        return cls(zeros, zeros)

    def append(self, block: KVCache, number: IntScalar, step: IntScalar | None = None) -> "History":
        """The history with one more block.

        Args:
            block: its keys and values, `[l b n m e]`.
            number: of the block.
            step: whose ring it enters, where each has its own.
        """
        slots = self.key.shape[-6]
        if not slots:
            return self
        index = (*(() if step is None else (step,)), number % slots)
        return History(write(self.key, block.key, *index), write(self.value, block.value, *index))

    def last(self, count: int, number: IntScalar, step: IntScalar | None = None) -> Past:
        """Keys and values of the `count` blocks before block `number`; arguments as in `append`."""
        # A ring of `count` slots is read whole: slices start within it in any case.
        first = jnp.maximum(number - count, 0)
        index = (*(() if step is None else (step,)), first)

        def past(layer):
            parts = (self.key, self.value)
            return tuple(_tokens(_layer_of(part, index, count, layer)) for part in parts)

        return past


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class BlockPosition:
    """Rotary position of a block, made on the host and passed to every call."""

    frame: Rotation  # frames_per_block pairs
    reference: Rotation  # 1 pairs
    slot: Any  # block slot of the window that this block overwrites
    filled: Any  # block slots valid after the write


def sink_frame(config: DiTConfig, current: Any, distance: Any) -> Any:
    """Rotary frame of the rolling reference, on the host or traced.

    Args:
        config: has the frame below which the reference does not fall.
        current: first latent frame of the block.
        distance: that the reference keeps ahead of it.
    """
    ahead = current + distance - config.reference_frame
    return config.reference_frame + ahead * (ahead > 0)


def block_position(
    config: DiTConfig, block: int, sink_distance: int, *, first_frame: int = 0
) -> BlockPosition:
    """Position of block number `block` of a stream.

    Args:
        config: size of the transformer.
        block: number of the block, from 0.
        sink_distance: latent frames that the rolling reference keeps ahead of the block's first.
        first_frame: rotary frame of block 0; the reference moves along with it.

    Returns:
        Host arrays; the reference stands at `max(reference_frame, current + sink_distance)`.

    Source: Live Avatar (arXiv 2512.04677), section on the rolling sink frame; the `max` and the
    random distance are the released code's.
    """
    current = config.frames_per_block * block
    reference = int(sink_frame(config, current, sink_distance))

    def turn(frames):
        return frame_rotation(
            [first_frame + f for f in frames],
            config.head_dim,
            theta=config.rope_theta,
            half=config.half_rotary,
        )

    return BlockPosition(
        frame=turn(range(current, current + config.frames_per_block)),
        reference=turn([reference]),
        slot=np.int32(block % config.ring_blocks),
        filled=np.int32(min(block + 1, config.ring_blocks)),
    )


def frame_table(config: DiTConfig, frames: int) -> Rotation:
    """Rotations along the frame axis at frames 0, 1, ...; host arrays, for `position_in`."""
    return frame_rotation(
        np.arange(frames), config.head_dim, theta=config.rope_theta, half=config.half_rotary
    )


def position_in(
    table: Rotation, config: DiTConfig, block: Any, sink_distance: Any, *, first_frame: Any = 0
) -> BlockPosition:
    """`block_position` with numbers that are known only when running.

    Args:
        table: from `frame_table`, with all frames that can come.
        config: size of the transformer.
        block: number of the block, from 0.
        sink_distance: see `block_position`.
        first_frame: latent frame that block 0 starts with. The reference keeps its distance, as
            if the blocks before had been streamed.
    """
    cos, sin = (jnp.asarray(part) for part in table)
    size = config.frames_per_block
    current = first_frame + size * block
    reference = sink_frame(config, current, sink_distance)
    frames = current + jnp.arange(size)
    return BlockPosition(
        frame=Rotation(cos[frames], sin[frames]),
        reference=Rotation(cos[reference][None], sin[reference][None]),
        slot=block % config.ring_blocks,
        filled=jnp.minimum(block + 1, config.ring_blocks),
    )


def write(buffer: Array, update: Array, *start: IntScalar | int) -> Array:
    """Writes `update` into the last axes of `buffer`, in place where XLA can.

    Args:
        buffer: keys or values.
        update: in any type, with as many axes or fewer.
        start: index of its first element along the first axes; 0 along the others.
    """
    missing = buffer.ndim - len(start)
    starts = [*(jnp.int32(i) for i in start), *[jnp.int32(0)] * missing]
    update = update.astype(buffer.dtype).reshape(*[1] * (buffer.ndim - update.ndim), *update.shape)
    return jax.lax.dynamic_update_slice(buffer, update, starts)


def empty_cache(config: DiTConfig, batch: int, height: int, width: int) -> KVCache:
    """A window with nothing in it.

    Args:
        config: size of the transformer.
        batch: samples.
        height: latent rows.
        width: latent columns.
    """
    tokens = (height // 2) * (width // 2)
    slots = config.cond_tokens(height, width) + config.ring_frames * tokens
    shape = (config.num_layers, batch, slots, config.num_heads, config.head_dim)
    return KVCache(jnp.zeros(shape, config.dtype), jnp.zeros(shape, config.dtype))


def _layer_of(blocks, first, count, layer):
    """`[.. w l b n m e]` -> some blocks of one layer, `[.. w b n m e]`.

    One slice inside the scan over layers, not one of the step before: what does not depend on the
    layer is moved out of the scan, and would be a copy of the window of all layers.
    """
    axis = len(first)  # of layers
    starts = [jnp.int32(i) for i in (*first, layer)] + [jnp.int32(0)] * (blocks.ndim - axis - 1)
    sizes = (*[1] * (axis - 1), count, 1, *blocks.shape[axis + 1 :])
    return jnp.squeeze(jax.lax.dynamic_slice(blocks, starts, sizes), axis)


def _tokens(blocks):
    """`[.. w b n m e]`, one of what is in front, -> `[b (w n) m e]`."""
    w, b, n, *heads = blocks.shape[-5:]
    return jnp.moveaxis(blocks.reshape(w, b, n, *heads), 0, 1).reshape(b, w * n, *heads)

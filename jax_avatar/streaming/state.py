"""State of a stream: a value that goes in and comes out with every block."""

from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_avatar.models.cache import KVCache, Sink
from jax_avatar.models.conditions import Conditions
from jax_avatar.models.speech.tokens import EARLIER_FRAMES
from jax_avatar.shapes import Array, AudioFeatures, Latent, TextStates
from jax_avatar.streaming.plan import StreamPlan

__all__ = ["StreamState", "add_context", "change_prompt", "renew"]

_RECENT = 2


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class StreamState:
    """Everything that a stream remembers; its windows are donated to the step that writes them.

    Attributes:
        conditions: of the next block; prompt and reference can change during a stream.
        sink: keys and values of the conditions.
        windows: KV_i, one for every step i, or a single one that all steps share.
        first: first generated latent frame, `b 1 h w c`; None before it is there.
        recent: the last two clean blocks, oldest first.
        earlier: end of the speech before the next block; None where nothing of it is heard.
        block: number g of the next block.
        is_stale: the conditions have changed since the sink was made.
    """

    conditions: Conditions
    sink: Sink
    windows: tuple[KVCache, ...]
    first: Any = None
    recent: tuple[Any, ...] = ()
    earlier: Any = None
    block: int = field(default=0, metadata={"static": True})
    is_stale: bool = field(default=False, metadata={"static": True})

    def with_window(self, i: int, window: KVCache) -> "StreamState":
        """The same with another KV_i; where all steps share one window, with another of those."""
        i %= len(self.windows)
        return replace(self, windows=(*self.windows[:i], window, *self.windows[i + 1 :]))

    def with_clean(self, latent: Latent) -> "StreamState":
        """The same with one more clean block."""
        return replace(self, recent=(*self.recent, latent)[-_RECENT:])


def renew(state: StreamState, plan: StreamPlan) -> StreamState:
    """Adaptive attention sink: before one block, the first latent replaces the portrait.

    Source: Live Avatar (arXiv 2512.04677), adaptive attention sink.
    """
    if not plan.is_renewal(state.block):
        return state
    conditions = state.conditions.with_reference(state.first)
    return replace(state, conditions=conditions, is_stale=True)


def change_prompt(state: StreamState, text: TextStates | np.ndarray) -> StreamState:
    """Another prompt from the next block on; windows keep what they have seen.

    Args:
        state: of the stream.
        text: prompt states, of the shape and type of those before.
    """
    return replace(state, conditions=state.conditions.with_text(text), is_stale=True)


def add_context(
    plan: StreamPlan, features: AudioFeatures | np.ndarray, earlier: Array | np.ndarray | None
) -> tuple[Array | np.ndarray, Array | np.ndarray | None]:
    """Speech features of a block, with what it hears of the time before.

    Args:
        plan: has the audio context.
        features: of the block's video frames.
        earlier: from the block before; None before block 0.

    Returns:
        What the block hears, and `earlier` of the next one.
    """
    if plan.audio_context == "block_reset":
        return features, None
    # Host arrays stay on the host, where nothing waits for a device.
    arrays = np if isinstance(features, np.ndarray) else jnp
    if earlier is None:
        earlier = arrays.repeat(features[:, :, :1], EARLIER_FRAMES, axis=2)
    heard = arrays.concatenate([earlier, features], axis=2)
    return heard, heard[:, :, -EARLIER_FRAMES:]

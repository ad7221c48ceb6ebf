"""What happens to which block at which step, decided by number alone.

Noise, rotary positions and the moment of the sink's renewal depend on the block's number and the
seed, never on the layout of devices, so every layout makes the same stream.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_avatar.diffusion.schedule import Schedule, euler_schedule
from jax_avatar.diffusion.step import euler_step
from jax_avatar.models.cache import BlockPosition, KVCache, Sink, block_position
from jax_avatar.models.config import DiTConfig
from jax_avatar.models.params import merge
from jax_avatar.shapes import Array, PyTree, Scalar

__all__ = ["Conditions", "StreamPlan", "denoise", "make_prefill"]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Conditions:
    """What a stream is told once.

    Attributes:
        text: prompt states, `b p f`.
        reference: the portrait's latent, `b 1 h w c`.
        motion: latents before the stream, `b t h w c`, or None where the network has no packer.
        pose: pose latents of one block, `b t h w c`, used for every block.
    """

    text: Any
    reference: Any
    motion: Any
    pose: Any

    def with_reference(self, reference: Array) -> "Conditions":
        """The same with another reference latent."""
        return replace(self, reference=reference)

    def with_text(self, text: Array) -> "Conditions":
        """The same with another prompt."""
        return replace(self, text=text)


@dataclass(frozen=True)
class StreamPlan:
    """Settings of a stream.

    Attributes:
        schedule: noise levels.
        aas_after_blocks: adaptive attention sink: renew the sink with the first generated latent
            before this block (4 in the release, 1 in the paper); 0 keeps the portrait for good.
        sink_distance: how far the rolling reference stands ahead of a block, drawn per block and
            step from this inclusive range; (4, 30) in the release. Equal ends fix it.
        seed: of noise and distances.
        first_frame: rotary frame of block 0; shifts the whole stream.
        noise: `(block, shape) -> noise` in place of the seeded noise.
        distance: `(block, step) -> distance` in place of the seeded draw.
    """

    schedule: Schedule = field(default_factory=lambda: euler_schedule(4))
    aas_after_blocks: int = 4
    sink_distance: tuple[int, int] = (4, 30)
    seed: int = 420
    first_frame: int = 0
    noise: Callable[[int, tuple[int, ...]], Array] | None = None
    distance: Callable[[int, int], int] | None = None

    def __post_init__(self):
        low, high = self.sink_distance
        if not 0 <= low <= high:
            raise ValueError(
                f"sink_distance {self.sink_distance} must be two numbers of latent frames, the "
                "smaller first, for example (4, 30)."
            )
        if self.aas_after_blocks < 0:
            raise ValueError(
                f"aas_after_blocks {self.aas_after_blocks}: give 4 (release), 1 (paper) or 0 (off)."
            )
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed {self.seed} must be within 0..{2**32 - 1}.")

    def position(self, config: DiTConfig, block: int, step: int) -> BlockPosition:
        """Where a block stands at a denoising step."""
        if self.distance is not None:
            distance = int(self.distance(block, step))
        else:
            low, high = self.sink_distance
            draw = np.random.default_rng([self.seed, block, step])
            distance = int(draw.integers(low, high + 1))
        return block_position(config, block, distance, first_frame=self.first_frame)

    def is_renewal(self, block: int) -> bool:
        """Whether the sink is renewed before this block."""
        return bool(self.aas_after_blocks) and block == self.aas_after_blocks

    def make_noise(self, shape: tuple[int, ...], dtype) -> Callable[[int], Array]:
        """Returns `block -> noise`; seeded by block, so that no layout changes it."""
        if self.noise is not None:
            return lambda block: jnp.asarray(self.noise(block, shape), dtype)
        key = jax.random.key(self.seed)

        @jax.jit
        def draw(block):
            return jax.random.normal(jax.random.fold_in(key, block), shape, dtype)

        return lambda block: draw(np.uint32(block))


def denoise(
    graphdef,
    params: PyTree,
    latent: Array,
    audio: Array,
    pose: Array,
    cache: KVCache,
    sink: Sink,
    position: BlockPosition,
    sigma: Scalar,
    next_sigma: Scalar,
    speaker_mask: Array | None = None,
) -> tuple[Array, KVCache]:
    """One denoising step of one block; the inner line of Algorithms 3 and 4.

    Args:
        graphdef: structure of the transformer, from `split`.
        params: its parameters.
        latent: the block at `sigma`.
        audio: speech features of the block.
        pose: pose latents of the block.
        cache: window of this step.
        sink: current sink.
        position: where the block stands.
        sigma: noise level, scalar.
        next_sigma: noise level to reach, scalar.
        speaker_mask: routing mask, for several speakers.

    Returns:
        The block at `next_sigma`, and the window with the block in it.
    """
    dit = merge(graphdef, params)
    timestep = jnp.broadcast_to(jnp.float32(1000) * sigma, latent.shape[:2])

    def velocity_fn(latent, sigma, cache):
        return dit.stream_block(
            latent, timestep, pose, audio, cache, sink, position, speaker_mask=speaker_mask
        )

    return euler_step(velocity_fn, latent, sigma, next_sigma, cache)


def make_prefill(graphdef) -> Callable[[PyTree, Conditions], Sink]:
    """Returns `(params, conditions) -> sink`."""

    def prefill(params, conditions):
        dit = merge(graphdef, params)
        return dit.prefill(conditions.text, conditions.reference, conditions.motion)

    return prefill

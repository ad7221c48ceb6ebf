"""Settings of a rollout, its random numbers, and the rules that follow from both.

Every choice among the settings becomes a function here, once, so that Algorithms 1 and 2 have none.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from jax_avatar.diffusion.sampling import Sampling
from jax_avatar.diffusion.schedule import few_step_schedule
from jax_avatar.models.cache import BlockPosition, KVCache, Sink, frame_table, position_in
from jax_avatar.models.config import DiTConfig
from jax_avatar.models.speech.tokens import EARLIER_FRAMES
from jax_avatar.shapes import Array, AudioFeatures, IntScalar, Latent
from jax_avatar.training.corrupt import make_corrupt

__all__ = ["RandomDraws", "RolloutConfig", "RolloutPlan", "sample_randomness"]


@dataclass(frozen=True, kw_only=True)
class RolloutConfig(Sampling):
    """Settings of the generator's rollout in training.

    The settings of `Sampling` are stored with the student, which is streamed with the same; those
    here are of training alone.

    Attributes:
        kv_noise: noise added to keys and values when they are written, relative to their size.
        kv_noise_on: "k", "v" or "both".
        kv_noise_sink: add it to the sink, too.
        sink_distance_per: "call", drawn for every block and evaluation, or "clip".
        shift_max: clips start at a latent frame drawn from 0 to this.
        gradient: "blocks", one block at a time (Algorithm 2), or "clip", through the whole rollout
            (Algorithm 1); the same gradient, more memory.
    """

    sigmas: Sequence[float] | str = few_step_schedule(4).sigmas
    kv_noise: float = 0.0
    kv_noise_on: str = "both"
    kv_noise_sink: bool = False
    sink_distance_per: str = "call"
    shift_max: int = 1003
    gradient: str = "blocks"

    SECTION = "rollout."
    CHOICES = Sampling.CHOICES | {
        "kv_noise_on": ("k", "v", "both"),
        "sink_distance_per": ("call", "clip"),
        "gradient": ("blocks", "clip"),
    }

    def __post_init__(self):
        super().__post_init__()
        if self.kv_noise < 0 or self.shift_max < 0:
            raise ValueError(
                f"rollout.kv_noise {self.kv_noise} and rollout.shift_max {self.shift_max} must not "
                "be negative."
            )


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class RandomDraws:
    """All random numbers of a clip, drawn up front: Algorithm 2's second pass needs the same."""

    noise: Any  # N b t h w c, X_g ~ N(0, I), where the blocks start
    distance: Any  # N T+1, of the reference, per block and step; the last is the refresh's
    first_frame: Any  # latent frame of block 0
    renoise_key: Any
    history_key: Any

    def new_noise(self, g: IntScalar, step: IntScalar) -> Latent:
        """Noise that block `g` is noised with anew after a step, or for the refresh of history."""
        return jax.random.normal(_fold(self.renoise_key, g, step), self.noise.shape[1:])

    def corrupt_key(self, g: IntScalar, step: IntScalar) -> Array:
        """Key of the noise on the keys and values that a step of block `g` writes."""
        return _fold(self.history_key, g, step)


def sample_randomness(
    key: Array, settings: RolloutConfig, num_blocks: int, shape: tuple[int, ...]
) -> RandomDraws:
    """Samples the random numbers of one clip.

    Args:
        key: of this clip, role and step; nothing else decides.
        settings: ranges.
        num_blocks: blocks of the clip.
        shape: of a block, `b t h w c`.
    """
    keys = jax.random.split(key, 5)
    low, high = settings.sink_distance
    table = (num_blocks, settings.num_steps + 1)
    drawn = table if settings.sink_distance_per == "call" else (1, 1)
    distance = jax.random.randint(keys[1], drawn, low, high + 1)
    return RandomDraws(
        noise=jax.random.normal(keys[0], (num_blocks, *shape)),
        distance=jnp.broadcast_to(distance, table),
        first_frame=jax.random.randint(keys[2], (), 0, settings.shift_max + 1),
        renoise_key=keys[3],
        history_key=keys[4],
    )


@dataclass(frozen=True)
class RolloutPlan:
    """Settings of a rollout for one size of transformer, and the functions that they choose.

    Attributes:
        config: size of the transformer; `ring_blocks - 1` blocks of the past are seen.
        settings: of the rollout.
    """

    config: DiTConfig
    settings: RolloutConfig

    @functools.cached_property
    def corrupt(self) -> Callable[[KVCache, Array], KVCache]:
        """`(keys and values, key) -> the same with noise`: History Corrupt."""
        settings = self.settings
        return make_corrupt(settings.kv_noise, settings.kv_noise_on)

    @functools.cached_property
    def corrupt_sink(self) -> Callable[[Sink, Array], Sink]:
        """Likewise of the sink."""
        return self.corrupt if self.settings.kv_noise_sink else lambda sink, key: sink

    @functools.cached_property
    def hear(self) -> Callable[[AudioFeatures, IntScalar], AudioFeatures]:
        """`(features of a clip, g) -> features that block g hears`."""
        latents = self.config.frames_per_block
        return functools.partial(_HEARING[self.settings.audio_context], latents)

    @functools.cached_property
    def new_noise(self) -> Callable[[RandomDraws, IntScalar, IntScalar], Latent | None]:
        """`(draws, g, step) -> noise` after a step; None where Euler's step needs none."""
        return _SAMPLERS[self.settings.sampler]

    @property
    def shares_history(self) -> bool:
        """All steps read the history of the exits; else every step has a ring of its own."""
        return self.settings.shares_history

    def levels(self) -> Array:
        """Noise levels of the steps, falling to 0, `[T + 1]`."""
        return jnp.asarray(self.settings.sigmas, jnp.float32)

    def window(self, num_blocks: int) -> int:
        """Blocks of the past that a block of a clip sees."""
        return min(self.config.ring_blocks - 1, num_blocks)

    def position(self, draws: RandomDraws, g: IntScalar, step: IntScalar) -> BlockPosition:
        """Rotary position of block `g` and of the reference at a step."""
        config, settings = self.config, self.settings
        last = settings.shift_max + config.frames_per_block * len(draws.noise)
        frames = max(config.reference_frame, last + settings.sink_distance[1]) + 1
        table, distance = frame_table(config, frames), draws.distance[g, step]
        return position_in(table, config, g, distance, first_frame=draws.first_frame)


def _hear_block(latents, features, g):
    return jax.lax.dynamic_slice_in_dim(features, 4 * latents * g, 4 * latents, axis=2)


def _hear_before_too(latents, features, g):
    before = jnp.repeat(features[:, :, :1], EARLIER_FRAMES, axis=2)
    features = jnp.concatenate([before, features], axis=2)
    frames = EARLIER_FRAMES + 4 * latents
    return jax.lax.dynamic_slice_in_dim(features, 4 * latents * g, frames, axis=2)


_HEARING = {"block_reset": _hear_block, "clip": _hear_before_too}
_SAMPLERS = {"euler": lambda draws, g, step: None, "renoise": RandomDraws.new_noise}


def _fold(key, g, step):
    return jax.random.fold_in(jax.random.fold_in(key, g + 1), step)

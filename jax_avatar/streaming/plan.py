"""Plan of a stream: noise, positions and sink renewal as functions of block and step.

Noise, rotary positions and the moment of the sink's renewal depend on the block's number and the
seed, never on the layout of devices, so every layout makes the same stream.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from jax_avatar.diffusion.sampling import Sampling
from jax_avatar.diffusion.schedule import euler_schedule
from jax_avatar.layout import Layout, parse_layout
from jax_avatar.models.cache import BlockPosition, block_position
from jax_avatar.models.config import DiTConfig
from jax_avatar.shapes import Array
from jax_avatar.weights.settings import StreamSettings

__all__ = ["StreamPlan", "check_slices", "stream_layout"]

_RENOISE = np.uint32(2**32 - 1)  # a number that no block has


@dataclass(frozen=True, kw_only=True)
class StreamPlan(Sampling):
    """Settings of a stream; those of `Sampling` are the model's, as it was trained.

    Attributes:
        aas_after_blocks: adaptive attention sink: renew the sink with the first generated latent
            before this block (4 in the release, 1 in the paper); 0 keeps the portrait.
        seed: of noise and distances.
        first_frame: rotary frame of block 0; shifts the whole stream.
        noise: `(block, shape) -> noise` in place of the seeded noise that a block starts from.
        new_noise: `(block, evaluation, shape) -> noise` in place of the seeded noise that a block
            is noised with anew, see `Sampling.takes_noise`.
        distance: `(block, evaluation) -> distance` in place of the seeded draw.
    """

    sigmas: Sequence[float] = euler_schedule(4).sigmas
    aas_after_blocks: int = 4
    seed: int = 420
    first_frame: int = 0
    noise: Callable[[int, tuple[int, ...]], Array] | None = None
    new_noise: Callable[[int, int, tuple[int, ...]], Array] | None = None
    distance: Callable[[int, int], int] | None = None

    @classmethod
    def from_settings(cls, settings: StreamSettings, seed: int) -> "StreamPlan":
        """The plan that a model's settings ask for."""
        return cls(**settings.sampling(), aas_after_blocks=settings.aas_after_blocks, seed=seed)

    def __post_init__(self):
        super().__post_init__()
        if self.aas_after_blocks < 0:
            raise ValueError(
                f"aas_after_blocks {self.aas_after_blocks}: give 4 (release), 1 (paper) or 0 (off)."
            )
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed {self.seed} must be within 0..{2**32 - 1}.")

    def position(self, config: DiTConfig, block: int, step: int) -> BlockPosition:
        """Position of a block at a denoising step, or at the refresh, the one after the last."""
        if self.distance is not None:
            distance = int(self.distance(block, step))
        else:
            low, high = self.sink_distance
            draw = np.random.default_rng([self.seed, block, step])
            distance = int(draw.integers(low, high + 1))
        return block_position(config, block, distance, first_frame=self.first_frame)

    def is_renewal(self, block: int) -> bool:
        """True if the sink is renewed before this block."""
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

    def make_new_noise(self, shape: tuple[int, ...], dtype) -> Callable[[int, int], Array]:
        """Returns `(block, evaluation) -> noise` to noise a block with anew.

        It is seeded by both, so that no layout changes it and no two evaluations share it.
        """
        if self.new_noise is not None:
            return lambda block, step: jnp.asarray(self.new_noise(block, step, shape), dtype)
        key = jax.random.fold_in(jax.random.key(self.seed), _RENOISE)

        @jax.jit
        def draw(block, step):
            of_block = jax.random.fold_in(key, block)
            return jax.random.normal(jax.random.fold_in(of_block, step), shape, dtype)

        return lambda block, step: draw(np.uint32(block), np.uint32(step))


def check_slices(sampling: Sampling, slices: int) -> None:
    """Refuses to spread the steps of a block over slices where blocks follow one another.

    Args:
        sampling: of the stream.
        slices: that denoise.

    Raises:
        ValueError: there are several, and all steps share one history.
    """
    if slices == 1 or not sampling.shares_history:
        return
    raise ValueError(
        f"--mesh: {slices} denoising slices, but the model has {sampling.history}: every step of a "
        "block reads what the last evaluation of the block before has written. This dependency is "
        "what timestep-forcing pipeline parallelism (TPP) removes, by histories of the steps' own "
        "(cache per_step, refresh none). Pass --mesh 1, or 1+1 for a VAE on its own device."
    )


def stream_layout(sampling: Sampling, mesh: str) -> Layout:
    """Layout of a stream from the `--mesh` argument, see `parse_layout`.

    Raises:
        ValueError: the steps do not spread over the slices, see also `check_slices`.
    """
    layout = parse_layout(mesh, sampling.num_steps)
    check_slices(sampling, layout.stages)
    return layout

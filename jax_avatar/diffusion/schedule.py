"""Noise levels from pure noise to clean, as the official samplers space them."""

import functools
import itertools
import re
from collections.abc import Callable
from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np

from jax_avatar.shapes import Array

__all__ = [
    "STEP_SETS",
    "Schedule",
    "euler_schedule",
    "few_step_schedule",
    "gaussian_weight",
    "level_of_draw",
    "named_schedule",
    "shift_sigma",
    "uniform_schedule",
]

_NUM_LEVELS = 1000  # of the official training tables


@dataclass(frozen=True)
class Schedule:
    """Descending noise levels, the last one 0.

    Attributes:
        sigmas: one level per denoising step, then 0; 1 is pure noise.
    """

    sigmas: tuple[float, ...]

    def __post_init__(self):
        object.__setattr__(self, "sigmas", tuple(float(s) for s in self.sigmas))
        falling = all(a > b for a, b in itertools.pairwise(self.sigmas))
        if len(self.sigmas) < 2 or not falling or self.sigmas[-1] != 0 or self.sigmas[0] > 1:
            raise ValueError(
                f"sigmas {self.sigmas} must fall from at most 1 to exactly 0, with at least one "
                "step; give for example (1.0, 0.75, 0.5, 0.25, 0.0)."
            )

    @property
    def num_steps(self) -> int:
        """Denoising steps."""
        return len(self.sigmas) - 1

    @property
    def timesteps(self) -> tuple[float, ...]:
        """Timestep input of the transformer at every step, `1000 * sigma` in float32."""
        return tuple((np.float32(1000) * np.array(self.sigmas[:-1], np.float32)).tolist())


def shift_sigma(sigma: np.ndarray | Array, shift: float) -> np.ndarray | Array:
    """Moves noise levels toward noise by the factor `shift`; 0 and 1 stay.

    Source: Esser et al., "Scaling Rectified Flow Transformers", arXiv 2403.03206, eq. 23.
    """
    return shift * sigma / (1 + (shift - 1) * sigma)


def euler_schedule(num_steps: int, shift: float = 3.0) -> Schedule:
    """The released Live Avatar schedule: shifted, spaced evenly, then shifted once more.

    Args:
        num_steps: denoising steps; 4 in the release.
        shift: factor toward noise; 3 in the release, whatever its flags say.

    Source: the released sampler (Alibaba-Quark/LiveAvatar), flow-matching Euler; the paper's
    algorithms read as evenly spaced, see `uniform_schedule`.
    """
    if num_steps < 1:
        raise ValueError(f"{num_steps} denoising steps; at least 1 is expected.")
    base = np.linspace(1.0, 0.001, 1000, dtype=np.float32)
    first, last = shift_sigma(base[[0, -1]].astype(np.float64), shift)
    even = np.linspace(first, last, num_steps)
    return Schedule((*shift_sigma(even, shift).astype(np.float32).tolist(), 0.0))


def uniform_schedule(num_steps: int) -> Schedule:
    """Evenly spaced levels, `dt = -1 / T` as in the paper's Algorithms 3 and 4."""
    return Schedule(tuple(np.linspace(1.0, 0.0, num_steps + 1).tolist()))


def few_step_schedule(num_steps: int = 4, shift: float = 5.0) -> Schedule:
    """Evenly spaced levels from 1, shifted once: 1000, 937.5, 833.3, 625 by default.

    Source: Self-Forcing (guandeh17/Self-Forcing), the list that distillation trains on.
    """
    if num_steps < 1:
        raise ValueError(f"{num_steps} denoising steps; at least 1 is expected.")
    return Schedule((*shift_sigma(np.linspace(1.0, 0.0, num_steps + 1)[:-1], shift).tolist(), 0.0))


STEP_SETS: dict[str, Callable[[int], Schedule]] = {
    "self_forcing": few_step_schedule,
    "shift3": functools.partial(few_step_schedule, shift=3.0),
    "paper_uniform": uniform_schedule,
    "released": euler_schedule,
}
"""Levels by name, for a number of steps; with four they are the timesteps 1000, 937.5, 833.3, 625;
1000, 900, 750, 500; 1000, 750, 500, 250; and 1000, 857.7, 602.2, 8.9."""


def named_schedule(name: str) -> Schedule:
    """One of `STEP_SETS`, and after a colon its number of steps: "shift3", or "shift3:2".

    Raises:
        ValueError: the name or the number is unknown.
    """
    kind, colon, count = name.partition(":")
    if kind not in STEP_SETS or (colon and not re.fullmatch(r"[1-9]\d*", count)):
        raise ValueError(
            f"sigmas {name!r}: expected one of {', '.join(STEP_SETS)}, and after a colon the "
            "number of steps, as in self_forcing:3; or the levels themselves, as in 1.0,0.5,0.0."
        )
    return STEP_SETS[kind](int(count) if colon else 4)


def level_of_draw(draw: np.ndarray | Array, shift: float) -> Array:
    """Shifted noise level of an integer draw, `draw / 1000` before the shift.

    It is computed, never looked up in a table: the nearest entry is up to 18 % off.

    Args:
        draw: integers within 0..1000.
        shift: factor toward noise.
    """
    return shift_sigma(jnp.asarray(draw, jnp.float32) / _NUM_LEVELS, shift)


def gaussian_weight(sigma: np.ndarray | Array, shift: float) -> Array:
    """Loss weight that is largest at the middle level and 0 at pure noise.

    Args:
        sigma: noise levels.
        shift: of the 1000 levels over which the weights have mean 1.

    Source: guandeh17/Self-Forcing, its flow-matching scheduler.
    """

    def above_lowest(level, expm1):
        # exp(-2 (level - 1/2)^2) over its value at level 1, less 1: nothing cancels.
        return expm1(2 * level * (1 - level))

    levels = shift_sigma(1 - np.arange(_NUM_LEVELS) / _NUM_LEVELS, shift)
    mean = above_lowest(levels, np.expm1).mean()
    return above_lowest(jnp.asarray(sigma, jnp.float32), jnp.expm1) / mean

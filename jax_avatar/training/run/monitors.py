"""Figures that show early when distillation goes astray, and what is done about one of them.

    generated clips ---measure_clips---+
    critic's and teacher's errors -----+--> sums in the state --every 50 steps--> figures, alarms

The sums are part of the saved state. Clips count only where the exit was the last step: an earlier
one leaves a first guess, which is smoother than a clip should be.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from jax_avatar.diffusion.schedule import shift_sigma
from jax_avatar.shapes import Array, IntScalar, Latent, Scalar

__all__ = [
    "ALARMS",
    "GAP_LIMIT",
    "NUM_BINS",
    "PREFIX",
    "ClipFigures",
    "MonitorState",
    "add_clips",
    "add_scores",
    "bin_shares",
    "find_alarms",
    "measure_clips",
    "measure_data",
    "new_monitor",
    "summarise",
]

PREFIX = "monitor/"
NUM_BINS = 4
"""Bins of the noise level, as many draws in each: at shift 5 their borders are the levels between
the four default steps, 0.625, 0.833 and 0.938."""

GAP_LIMIT = 1.02
"""Above this ratio of the critic's to the teacher's error the critic lags behind."""

ALARMS = (
    ("gap", "above", GAP_LIMIT, "the critic lags behind the generator"),
    ("motion", "below", 0.5, "clips move too little"),
    ("motion", "above", 1.25, "clips move too much, faster or restlessly"),
    ("mean_shift", "above", 3.0, "a latent channel drifts away from the data"),
    ("std_shift", "above", 3.0, "the contrast of a latent channel leaves that of the data"),
)
"""Monitor, side, limit and meaning of every alarm."""

_LARGE = 4.0
_SMALL = 1e-6
_LEAST_SPREAD = 1e-2  # of latents, whose deviation is about 1


@dataclass(frozen=True, eq=False)
class ClipFigures:
    """Statistics of the data's clips, compared with those of generated ones.

    Attributes:
        motion: mean change from one latent frame to the next.
        mean: of every channel.
        mean_spread: deviation of a clip's mean from it.
        std: of every channel within a clip.
        std_spread: deviation of a clip's from it.
    """

    motion: float
    mean: np.ndarray
    mean_spread: np.ndarray
    std: np.ndarray
    std_spread: np.ndarray


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class MonitorState:
    """Sums since the last summary, and how often the critic learns.

    Attributes:
        clips: measures by name, summed over clips, and their number `count`.
        critic: the critic's error per bin of the noise level, summed over clips.
        teacher: the teacher's, without guidance, on the same noised clips.
        critic_steps: updates of the critic per step.
    """

    # Any, because JAX and Orbax rebuild the state with other leaves inside.
    clips: Any
    critic: Any
    teacher: Any
    critic_steps: Any


def new_monitor(channels: int) -> MonitorState:
    """Before the first step."""
    names = {"count": (), "motion": (), "border": (), "inside": (), "large": ()}
    names |= {"mean": (channels,), "std": (channels,), "slope": (channels,)}
    sums = {name: jnp.zeros(shape) for name, shape in names.items()}
    return MonitorState(sums, jnp.zeros(NUM_BINS), jnp.zeros(NUM_BINS), jnp.int32(1))


def measure_clips(clips: Latent, frames_per_block: int) -> dict[str, Array]:
    """Measures of every clip, a leading axis of clips each.

    `motion` is the mean change between neighbouring latent frames, `border` that across borders of
    blocks and `inside` that within blocks; `large` the share of values beyond 4; `mean` and `std`
    those of every channel; `slope` the change of a channel's mean per block (least squares), which
    stands in for a slope of luminance: latents of a picture that darkens drift with it.

    Args:
        clips: whole blocks.
        frames_per_block: latent frames of each.
    """
    clips = clips.astype(jnp.float32)
    t = clips.shape[1]
    jumps = jnp.abs(jnp.diff(clips, axis=1)).mean((2, 3, 4))  # b t-1
    is_border = np.arange(1, t) % frames_per_block == 0
    blocks = clips.reshape(len(clips), t // frames_per_block, -1, clips.shape[-1]).mean(2)
    place = np.arange(blocks.shape[1]) - (blocks.shape[1] - 1) / 2
    weight = jnp.asarray(place / max(np.square(place).sum(), 1), jnp.float32)
    return {
        "count": jnp.ones(len(clips)),
        "motion": jumps.mean(1),
        "border": _mean_where(jumps, is_border),
        "inside": _mean_where(jumps, ~is_border),
        "large": (jnp.abs(clips) > _LARGE).mean((1, 2, 3, 4)),
        "mean": clips.mean((1, 2, 3)),
        "std": clips.std((1, 2, 3)),
        "slope": jnp.einsum("bnc,n->bc", blocks, weight),
    }


def measure_data(clips: Float[np.ndarray, "b t h w c"], frames_per_block: int) -> ClipFigures:
    """Measures the statistics of clips of the data.

    Args:
        clips: a few hundred windows as long as the generator's clips.
        frames_per_block: latent frames of a block.
    """
    measure = jax.jit(measure_clips, static_argnums=1)
    parts = [measure(jnp.asarray(clips[i : i + 1]), frames_per_block) for i in range(len(clips))]
    found = {
        name: np.concatenate([np.asarray(part[name], np.float64) for part in parts])
        for name in ("motion", "mean", "std")
    }
    return ClipFigures(
        motion=float(found["motion"].mean()),
        mean=found["mean"].mean(0),
        mean_spread=found["mean"].std(0),
        std=found["std"].mean(0),
        std_spread=found["std"].std(0),
    )


def add_clips(
    monitor: MonitorState, clips: Latent, is_final: Array, frames_per_block: int
) -> MonitorState:
    """Adds the measures of generated clips.

    Args:
        monitor: so far.
        clips: that the generator made.
        is_final: whether their exit was the last step; others do not count.
        frames_per_block: latent frames of a block.
    """
    found = measure_clips(clips, frames_per_block)
    # Chosen, not multiplied: NaN must not enter the sums.
    sums = {
        name: monitor.clips[name] + jnp.where(is_final, value.sum(0), 0)
        for name, value in found.items()
    }
    return dataclasses.replace(monitor, clips=sums)


def add_scores(
    monitor: MonitorState, sigma: Float[Array, " b"], critic: Float[Array, " b"],
    teacher: Float[Array, " b"], shift: float,
) -> MonitorState:  # fmt: skip
    """Adds errors of the critic and of the teacher on the same noised clips.

    Args:
        monitor: so far.
        sigma: noise level of every clip.
        critic: mean square error of its velocity.
        teacher: likewise, without guidance.
        shift: of the draws of noise levels.
    """
    is_in = _bins(sigma, shift)
    is_in = jnp.where(jnp.isfinite(critic + teacher)[:, None], is_in, False)
    sums = [jnp.where(is_in, error[:, None], 0).sum(0) for error in (critic, teacher)]
    return dataclasses.replace(
        monitor, critic=monitor.critic + sums[0], teacher=monitor.teacher + sums[1]
    )


def bin_shares(sigma: Float[Array, " b"], shift: float) -> dict[str, Array]:
    """Share of the clips in each bin of the noise level, as metrics."""
    shares = _bins(sigma, shift).mean(0)
    return {f"level_bin{i}": shares[i] for i in range(NUM_BINS)}


def summarise(
    monitor: MonitorState,
    step: IntScalar,
    data: ClipFigures | None,
    *,
    every: int,
    max_critic_steps: int,
) -> tuple[MonitorState, dict[str, Array]]:
    """The figures at the end of an interval, and the sums set back.

    While the critic lags behind, it learns twice as often after each interval, and again half as
    often when it has caught up.

    Args:
        monitor: after the step.
        step: its number, from 0.
        data: to compare with; without it what is relative stays out.
        every: length of an interval.
        max_critic_steps: most updates of the critic per step.

    Returns:
        The monitor, and metrics: NaN where nothing was measured, and between the ends of intervals.
    """
    is_end = (step + 1) % every == 0
    figures = {PREFIX + name: value for name, value in _figures(monitor, data).items()}
    gap, steps = figures[f"{PREFIX}gap"], monitor.critic_steps
    fewer, more = jnp.maximum(steps // 2, 1), jnp.minimum(2 * steps, max_critic_steps)
    # Without a figure, as before.
    wanted = jnp.where(gap > GAP_LIMIT, more, jnp.where(gap <= GAP_LIMIT, fewer, steps))
    cleared = jax.tree.map(lambda leaf: jnp.where(is_end, jnp.zeros_like(leaf), leaf), monitor)
    monitor = dataclasses.replace(cleared, critic_steps=jnp.where(is_end, wanted, steps))
    figures = {name: jnp.where(is_end, value, jnp.nan) for name, value in figures.items()}
    return monitor, figures | {"critic_steps": steps}


def find_alarms(values: Mapping[str, float]) -> dict[str, str]:
    """Alarms of the monitors that have a value: name -> what is wrong, empty if nothing is."""
    found = {}
    for name, side, limit, meaning in ALARMS:
        if PREFIX + name not in values:
            continue
        value = values[PREFIX + name]
        is_wrong = value > limit if side == "above" else value < limit
        found.setdefault(name, "")
        if is_wrong:
            found[name] = f"{PREFIX}{name} is {value:.3g}, {side} {limit:g}: {meaning}"
    return found


def _figures(monitor: MonitorState, data: ClipFigures | None) -> dict[str, Scalar]:
    clips = {name: value / monitor.clips["count"] for name, value in monitor.clips.items()}
    figures = {
        "gap": monitor.critic.sum() / monitor.teacher.sum(),
        "large_share": clips["large"],
        "border_jump": clips["border"] / clips["inside"],
    }
    ratios = monitor.critic / monitor.teacher
    figures |= {f"gap_bin{i}": ratios[i] for i in range(NUM_BINS)}
    if data is None:
        return figures

    def shift(name, usual, spread):
        return jnp.max(jnp.abs(clips[name] - usual) / jnp.maximum(spread, _LEAST_SPREAD))

    slope = clips["slope"] / jnp.maximum(data.std, _SMALL)
    return figures | {
        "motion": clips["motion"] / max(data.motion, _SMALL),
        "mean_shift": shift("mean", data.mean, data.mean_spread),
        "std_shift": shift("std", data.std, data.std_spread),
        "slope": jnp.sqrt(jnp.mean(jnp.square(slope))),
    }


def _bins(sigma, shift):
    """One-hot bin of every clip's noise level, `[b bins]`."""
    borders = shift_sigma(np.arange(1, NUM_BINS) / NUM_BINS, shift)
    number = jnp.searchsorted(jnp.asarray(borders, jnp.float32), sigma, side="right")
    return number[:, None] == np.arange(NUM_BINS)[None]


def _mean_where(jumps, chosen):
    """Mean over some of the frames; zero if there are none."""
    weight = jnp.asarray(chosen / max(chosen.sum(), 1), jnp.float32)
    return jumps @ weight

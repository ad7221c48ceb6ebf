"""Scores of generated motion against the truth of held-out speech, without pictures.

latents --the VAE's linear code--> curves --by group (mouth, lids, gaze, head)--> scores

Several seeds of every clip tell what follows from the speech and what is drawn: a sampler
has as much variance between seeds as the truth has where speech says nothing.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from jax_avatar.evaluation.scores import interval
from jax_avatar.evaluation.tables import table
from jax_avatar.models.vae.anchored import GROUP, AnchoredVAEConfig

__all__ = ["BLINK", "curves_of", "frechet", "groups_of", "motion_rows", "motion_scores"]

Curves = Float[np.ndarray, "s b T c"]

LIPS = ("jawOpen", "mouthFunnel", "mouthPucker", "mouthPressLeft", "mouthStretchLeft")
"""Curves whose correlation with the truth is the score of the lips."""
BLINK = 0.5
"""Closure of the lids, 0 open to 1 closed, at which a blink counts."""
COLUMNS = {
    "lip_r": "lip r",
    "lip_r_mean": "r of the mean",
    "lip_amplitude": "amplitude",
    "lip_lag_frames": "lag",
    "blinks": "blinks/min",
    "energy": "energy m/l/g/h",
    "speed": "speed m/l/g/h",
    "seeds": "seeds m/l/g/h",
    "distance": "FD m/l/g/h",
    "jump": "jump g/h",
}
"""Scores of a table, and what its columns are called."""

_LAGS = range(-4, 5)
_ZERO = _LAGS.index(0)
_WINDOW_S = 2  # of motion whose distribution is compared
_COMPONENTS = 24
_SHOWN = {"energy": 4, "speed": 4, "seeds": 4, "distance": 4, "jump": 2}


def groups_of(config: AnchoredVAEConfig) -> dict[str, list[int]]:
    """Curves of mouth, lids, gaze and head; brows and cheeks are in none of them."""
    names = list(config.curves)
    first = config.pose_slice.start
    named = {
        "mouth": [n for n in names if n.startswith(("jaw", "mouth", "tongue"))],
        "lids": [n for n in names if n.startswith("eyeBlink")],
        "gaze": [n for n in names if n.startswith("gaze")],
        "head": names[first : first + 6],
    }
    return {group: [names.index(n) for n in found] for group, found in named.items()}


def curves_of(vae: Any, latents: Float[np.ndarray, "b t h w z"]) -> Float[np.ndarray, "b T c"]:
    """Scaled curves of motion that latents stand for, four frames each.

    Args:
        vae: an `AnchoredVAE`.
        latents: of clips.
    """
    b, t = latents.shape[:2]
    flat = jnp.asarray(latents, jnp.float32).reshape(b * t, -1)
    return np.asarray(vae.basis.to_curves(flat)).reshape(b, t * GROUP, -1)


def motion_scores(
    made: Curves,
    truth: Float[np.ndarray, "b T c"],
    config: AnchoredVAEConfig,
    fps: int,
    *,
    seed: int = 0,
) -> dict[str, Any]:
    """Scores of made motion, and as `interval` the ends of 95 % bootstrap intervals over clips.

    Args:
        made: curves of `s` seeds, from `curves_of`.
        truth: of the same clips, through the same code.
        config: names the curves.
        fps: frames per second.
        seed: of the bootstrap's draws.

    Returns:
        `lip_r`: Pearson correlation of `LIPS` with the truth, mean over curves, clips and seeds;
        `lip_r_mean`: that of the mean over seeds; `lip_r_other`: with the truth of the next clip;
        `lip_lag_frames`: shift of the highest mean correlation, positive if the motion is late;
        `lip_amplitude`: deviation of the jaw over the truth's; `blinks`: per minute, `blinks_true`;
        and by group `energy_*`: variance over the truth's; `speed_*`: that of the change from
        frame to frame; `seeds_*`: variance between seeds over the truth's variance (with two
        seeds or more); `jump_*`: change at the borders of latents over that inside, over the
        truth's; `distance_*`: see `frechet`.
    """
    groups = groups_of(config)
    measures = _measure(made, truth, config, groups)

    def statistic(index):
        return _summary({name: value[index] for name, value in measures.items()}, fps)

    scores = statistic(np.arange(len(truth)))
    ends = interval(statistic, len(truth), draws=500, seed=seed)
    for group, part in groups.items():
        pairs = made[0][..., part], truth[..., part]
        scores[f"distance_{group}"] = frechet(*pairs, _WINDOW_S * fps)
    return scores | {"interval": {name: list(pair) for name, pair in ends.items()}}


def frechet(
    made: Float[np.ndarray, "b T c"], truth: Float[np.ndarray, "b T c"], window: int
) -> float:
    """Frechet distance of windows of motion in the truth's main components, over its variance.

    It sees means and covariances only: 0 is alike, 1 is as far as a point from the truth.

    Args:
        made: curves.
        truth: curves.
        window: frames.

    Source: Heusel et al., "GANs Trained by a Two Time-Scale Update Rule", arXiv 1706.08500.
    """

    def windows(curves):
        starts = range(0, curves.shape[1] - window + 1, max(1, window // 4))
        parts = [curves[:, s : s + window].reshape(len(curves), -1) for s in starts]
        return np.concatenate(parts).astype(np.float64)

    real, found = windows(truth), windows(made)
    middle = real.mean(0)
    _, _, directions = np.linalg.svd(real - middle, full_matrices=False)
    directions = directions[:_COMPONENTS]
    real, found = (real - middle) @ directions.T, (found - middle) @ directions.T
    a, b = np.cov(real.T), np.cov(found.T)
    values, vectors = np.linalg.eigh(a)
    half = (vectors * np.sqrt(values.clip(0))) @ vectors.T
    shared = np.sqrt(np.linalg.eigvalsh(half @ b @ half).clip(0)).sum()
    distance = np.square(found.mean(0)).sum() + np.trace(a + b) - 2 * shared
    return float(distance / np.trace(a))


def motion_rows(rows: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Lines of a Markdown table, one row each for what `motion_scores` returned, by name."""
    return table(rows, COLUMNS, _cell)


def _cell(scores: Mapping[str, Any], key: str) -> str:
    if key in _SHOWN:
        groups = ("mouth", "lids", "gaze", "head")[-_SHOWN[key] :]
        found = [scores.get(f"{key}_{group}") for group in groups]
        return " / ".join("n/a" if x is None else f"{x:.2f}" for x in found)
    if key not in scores:
        return "n/a"
    low, high = scores["interval"][key]
    digits = {"lip_lag_frames": 0, "blinks": 1}.get(key, 2)
    return f"{scores[key]:.{digits}f} ({low:.{digits}f}..{high:.{digits}f})"


def _measure(
    made: Curves,
    truth: np.ndarray,
    config: AnchoredVAEConfig,
    groups: Mapping[str, Sequence[int]],
) -> dict[str, np.ndarray]:
    """Measures with the clips in front."""
    names = list(config.curves)
    lips = [names.index(name) for name in LIPS if name in names]
    lids, jaw = groups["lids"], names.index("jawOpen")
    scale = np.asarray(config.scale)[lids]
    found = {
        "lips": _at_lags(made[..., lips], truth[None][..., lips]),
        "lips_mean": _at_lags(made.mean(0)[None][..., lips], truth[None][..., lips])[:, _ZERO],
        "lips_other": _at_lags(made[..., lips], np.roll(truth, 1, 0)[None][..., lips])[:, _ZERO],
        "jaw": np.stack([made[..., jaw].std(2).mean(0), truth[..., jaw].std(1)], 1),
        "closures": np.stack(
            [
                _closures((made[..., lids] * scale).mean(-1)).mean(0),
                _closures((truth[..., lids] * scale).mean(-1)),
                np.full(len(truth), truth.shape[1]),
            ],
            1,
        ),
    }
    for group, part in groups.items():
        own, true = made[..., part], truth[..., part]
        centre = true.mean((0, 1), keepdims=True)
        found[f"energy_{group}"] = np.stack(
            [np.square(own - centre[None]).mean((0, 2, 3)), np.square(true - centre).mean((1, 2))],
            1,
        )
        found[f"speed_{group}"] = np.stack([_speed(own), _speed(true[None])], 1)
        at_border = partial(_speed, at=slice(GROUP - 1, None, GROUP))
        found[f"jump_{group}"] = np.stack([at_border(own), at_border(true[None])], 1)
        if len(made) > 1:
            between = own.var(0, ddof=1).mean((1, 2))
            found[f"seeds_{group}"] = np.stack([between, np.square(true - centre).mean((1, 2))], 1)
    return found


def _summary(measures: Mapping[str, np.ndarray], fps: int) -> dict[str, float]:
    means = {name: np.nanmean(value, 0) for name, value in measures.items()}
    lips = means["lips"]
    made, true, frames = means["closures"]
    scores = {
        "lip_r": lips[_ZERO],
        "lip_r_mean": means["lips_mean"],
        "lip_r_other": means["lips_other"],
        "lip_lag_frames": float(_LAGS[int(np.argmax(lips))]),
        "lip_amplitude": means["jaw"][0] / means["jaw"][1],
        "blinks": made / frames * fps * 60,
        "blinks_true": true / frames * fps * 60,
    }
    for name, value in means.items():
        if name.startswith(("energy_", "speed_", "seeds_")):
            scores[name] = value[0] / value[1]
    for name in [name for name in means if name.startswith("jump_")]:
        ends, speeds = means[name], means[name.replace("jump", "speed")]
        scores[name] = (ends[0] / max(speeds[0], 1e-12)) / (ends[1] / speeds[1])
    return {name: float(value) for name, value in scores.items()}


def _speed(curves: np.ndarray, at: slice = slice(None)) -> Float[np.ndarray, " b"]:
    """Mean square change from frame to frame of `s b T c`, by clip."""
    return np.square(np.diff(curves, axis=2)[:, :, at]).mean((0, 2, 3))


def _closures(lids: Float[np.ndarray, "*s b T"]) -> np.ndarray:
    """Number of closures of the lids."""
    return ((lids[..., 1:] > BLINK) & (lids[..., :-1] <= BLINK)).sum(-1)


def _at_lags(made: np.ndarray, truth: np.ndarray) -> Float[np.ndarray, "b lags"]:
    """Correlation of `made[t + lag]` with `truth[t]`, mean over seeds and curves; NaN if still."""
    count, found = truth.shape[2], []
    for lag in _LAGS:
        a = made[:, :, max(0, lag) : count + min(0, lag)]
        b = truth[:, :, max(0, -lag) : count - max(0, lag)]
        a, b = (x - x.mean(2, keepdims=True) for x in (a, b))
        product, spread = (a * b).sum(2), np.sqrt((a**2).sum(2) * (b**2).sum(2))
        is_still = (b**2).mean(2) < 1e-4
        r = np.where(is_still, np.nan, product / np.maximum(spread, 1e-9))
        with np.errstate(all="ignore"):
            found.append(np.nanmean(r, (0, 2)))
    return np.stack(found, 1)

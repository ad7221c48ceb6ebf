"""Scores of generated talking people against the ground truth.

frames, truth --measure--> Measures, clip by clip --summarise--> scores
                                                 --interval----> bootstrap intervals over clips
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int, UInt8

from jax_avatar.data.records import ClipRecord
from jax_avatar.evaluation.mouth_probe import MouthProbe
from jax_avatar.models.network import Network
from jax_avatar.pixels import from_uint8, psnr, to_uint8

__all__ = [
    "Measures",
    "Truth",
    "contact_sheet",
    "fit_probe",
    "has_lips",
    "interval",
    "measure",
    "reconstruct",
    "score",
    "score_stream",
    "still_portraits",
    "summarise",
]

Frames = UInt8[np.ndarray, "b T H W 3"]
_LAGS = range(-6, 7)
_SMALL = 1e-6


@dataclass(frozen=True)
class Truth:
    """Ground truth of clips; lips only where they are known."""

    frames: Frames
    portrait: UInt8[np.ndarray, "b H W 3"]
    resting_box: Float[np.ndarray, "b 4"] | None  # where the mouth usually is
    lip_gap: Float[np.ndarray, "b T"] | None
    person: Int[np.ndarray, " b"]

    @classmethod
    def from_clips(
        cls, clips: Sequence[ClipRecord], start: int = 0, stop: int | None = None
    ) -> "Truth":
        """Frames `start` to `stop` of clips, which must be as many in each.

        A clip without a portrait of its own has its first frame for one.
        """
        part, box, gap = slice(start, stop), None, None
        if all(has_lips(clip) for clip in clips):
            box = np.stack([np.median(clip.mouth_box, axis=0) for clip in clips])
            gap = np.stack([clip.lip_gap[part] for clip in clips])
        return cls(
            frames=np.stack([clip.frames[part] for clip in clips]),
            portrait=np.stack([_portrait(clip) for clip in clips]),
            resting_box=box,
            lip_gap=gap,
            person=np.array([clip.person_id for clip in clips]),
        )

    def cut(self, stop: int) -> "Truth":
        """The same up to a frame."""
        gap = None if self.lip_gap is None else self.lip_gap[:, :stop]
        return dataclasses.replace(self, frames=self.frames[:, :stop], lip_gap=gap)


@dataclass(frozen=True)
class Measures:
    """Measurements that `summarise` turns into scores, one row per clip.

    Attributes:
        own: distance of the mean picture from the portrait of the same person.
        other: mean distance of it from those of other people; NaN where there are none.
        change: mean absolute change between frames, and of the truth, by phase of a latent,
            `b 2 4`.
        flicker: likewise of that change, `b 2`.
        error: mean square error of the pixels in grey levels, and of the still portrait's, `b 2`.
        lips: correlation of the lips' opening with the truth at every lag, `b lags`; NaN where the
            truth does not move; None where it is not known.
        lips_other: mean correlation with the truth of other clips.
        amplitude: deviation of the opening over the truth's.
    """

    own: Float[np.ndarray, " b"]
    other: Float[np.ndarray, " b"]
    change: Float[np.ndarray, "b 2 4"]
    flicker: Float[np.ndarray, "b 2"]
    error: Float[np.ndarray, "b 2"]
    lips: Float[np.ndarray, "b n"] | None = None
    lips_other: Float[np.ndarray, " b"] | None = None
    amplitude: Float[np.ndarray, " b"] | None = None

    def take(self, index: Int[np.ndarray, " n"]) -> "Measures":
        """Some of the clips, any of them more than once."""
        chosen = {
            field.name: value if (value := getattr(self, field.name)) is None else value[index]
            for field in dataclasses.fields(self)
        }
        return Measures(**chosen)


def has_lips(clip: ClipRecord) -> bool:
    """True if place and opening of the mouth are known, as of rendered people."""
    return clip.mouth_box is not None and clip.lip_gap is not None


def still_portraits(truth: Truth) -> Frames:
    """Clips that show their portraits standing still: what any model must be better than."""
    still = np.broadcast_to(truth.portrait[:, None], truth.frames.shape)
    return np.ascontiguousarray(still)


def reconstruct(network: Network, truth: Truth) -> Frames:
    """Encoded and decoded again by a VAE: what remains of the truth in the latents."""

    @jax.jit
    def again(network, portrait, video):
        vae = network.bind()
        portrait, video = from_uint8(portrait), from_uint8(video)
        latent = vae.encode_clip(portrait, video)
        first, state = vae.start(portrait[:, None], latent[:, :1])
        later, _ = vae.decode_next(state, latent[:, 1:])
        return to_uint8(jnp.concatenate([first, later], 1))

    pairs = zip(truth.portrait[:, None], truth.frames[:, None], strict=True)
    return np.concatenate([np.asarray(again(network, *pair)) for pair in pairs])


def fit_probe(clips: Sequence[ClipRecord], num_steps: int = 1200) -> MouthProbe:
    """A probe of the mouth's opening that looks where the mouth usually is.

    A generated head moves its own way, so the place of the true mouth may not be used.
    """
    boxes = [np.median(clip.mouth_box, axis=0) for clip in clips]
    return MouthProbe.fit(
        np.concatenate([clip.frames for clip in clips]),
        np.concatenate(
            [
                np.repeat(box[None], len(clip.frames), 0)
                for box, clip in zip(boxes, clips, strict=True)
            ]
        ).astype(np.float32),
        np.concatenate([clip.lip_gap for clip in clips]),
        num_steps=num_steps,
    )


def score(frames: Frames, truth: Truth, probe: MouthProbe | None) -> dict[str, float]:
    """Scores of generated clips; see `measure` and `summarise`."""
    return summarise(measure(frames, truth, probe))


def measure(frames: Frames, truth: Truth, probe: MouthProbe | None) -> Measures:
    """Measures of generated clips.

    Args:
        frames: as many as the truth has.
        truth: of the same clips.
        probe: reads the opening of the mouth; without it, or without the truth, lips stay out.
    """
    pairs = frames, truth.frames
    own, other = _distances(frames, truth)
    error = [_square_error(shown, truth.frames) for shown in (frames, still_portraits(truth))]
    lips = {}
    if probe is not None and truth.lip_gap is not None:
        lips = _lip_measures(_openings(frames, truth, probe), truth.lip_gap)
    return Measures(
        own=own,
        other=other,
        change=np.stack([_by_phase(_change(shown, 1)) for shown in pairs], axis=1),
        flicker=np.stack([_change(shown, 2).mean(1) for shown in pairs], axis=1),
        error=np.stack(error, axis=1),
        **lips,
    )


def summarise(measures: Measures) -> dict[str, float]:
    """Scores of some clips together.

    Returns:
        `psnr`: of the pixels, in dB, mean of the clips; `psnr_above_still`: that less the PSNR of
        the portrait standing still;
        `identity`: distance of the mean picture from the portrait's own person over that from
        other people, 0 is perfect and 1 a stranger, left out where there is one person only;
        `motion`: change from frame to frame over the truth's; `flicker`: how much that change
        itself changes, over the truth's; `latent_jump`: change at borders of latents over the
        change inside them; and where lips are known
        `lip_r`: Pearson correlation of the opening of the generated mouth with the truth, mean of
        the clips; `lip_r_other`: with the truth of every other clip, which should be near zero;
        `lip_lag_frames`: shift at which the mean correlation is highest, positive if the picture
        is late; `lip_r_best`: there; `lip_amplitude`: deviation of the opening over the truth's.
    """
    clip_psnr = psnr(measures.error)
    # Every fourth change crosses a border; which one depends on the first frame.
    phases = measures.change[:, 0].mean(0)
    change, flicker = measures.change.mean((0, 2)), measures.flicker.mean(0)
    scores = {
        "psnr": clip_psnr[:, 0].mean(),
        "psnr_above_still": (clip_psnr[:, 0] - clip_psnr[:, 1]).mean(),
        "motion": change[0] / max(change[1], _SMALL),
        "flicker": flicker[0] / max(flicker[1], _SMALL),
        "latent_jump": phases.max() / max(np.sort(phases)[:3].mean(), _SMALL),
    }
    if np.isfinite(measures.other).all():
        scores["identity"] = measures.own.mean() / measures.other.mean()
    if measures.lips is not None and np.isfinite(measures.lips).any():
        curve = np.nanmean(measures.lips, axis=0)
        best = int(np.argmax(curve))
        scores |= {
            "lip_r": curve[_LAGS.index(0)],
            "lip_r_best": curve[best],
            "lip_lag_frames": _LAGS[best],
            "lip_r_other": measures.lips_other.mean(),
            "lip_amplitude": np.median(measures.amplitude),
        }
    return {name: float(value) for name, value in scores.items()}


def interval(
    statistic: Callable[[Int[np.ndarray, " n"]], Mapping[str, float]],
    count: int,
    *,
    draws: int = 1000,
    level: float = 0.95,
    seed: int = 0,
) -> dict[str, tuple[float, float]]:
    """Bootstrap intervals of statistics of clips, by percentiles.

    Args:
        statistic: `numbers of clips -> values by name`; a number may come more than once.
        count: clips there are.
        draws: sets of clips, each of `count` drawn with replacement.
        level: share of the draws inside.
        seed: of the draws.

    Returns:
        Lower and upper end by name.

    Source: Efron and Tibshirani, "An Introduction to the Bootstrap", 1993, chapter 13.
    """
    rng = np.random.default_rng(seed)
    found = [statistic(rng.integers(0, count, count)) for _ in range(draws)]
    outside = (1 - level) / 2
    ends = {}
    for name in found[0]:
        # A draw of silent clips only has no score of lips.
        values = [scores[name] for scores in found if name in scores]
        low, high = np.quantile(values, [outside, 1 - outside])
        ends[name] = float(low), float(high)
    return ends


def score_stream(
    frames: Frames, portrait: UInt8[np.ndarray, "b H W 3"], window: int, *, seed: int = 0
) -> dict[str, Any]:
    """Drift of the picture in a long stream: last `window` frames against the first.

    Args:
        frames: of the streams of several people.
        portrait: of each of them.
        window: frames at either end.
        seed: of the bootstrap's draws of people.

    Returns:
        `colour_drift`: change of the mean colour in grey levels; `sharpness`: gradient energy over
        the first window's; `portrait_distance_first` and `_last`: mean absolute difference of the
        windows' mean pictures from the portrait, in grey levels; `identity_first` and `_last`:
        that distance over the distance from the other portraits, 1 is a stranger; and as
        `interval` the ends of their 95 % bootstrap intervals over people.
    """
    ends = {"first": frames[:, :window], "last": frames[:, -window:]}
    ends = {name: part.astype(np.float32) for name, part in ends.items()}
    still, count = portrait.astype(np.float32), len(portrait)
    colour = {name: part.mean((1, 2, 3)) for name, part in ends.items()}
    energy = {
        name: sum(np.abs(np.diff(part, axis=axis)).mean((1, 2, 3, 4)) for axis in (2, 3))
        for name, part in ends.items()
    }
    distance = {
        name: np.abs(part.mean(1)[:, None] - still[None]).mean((2, 3, 4))
        for name, part in ends.items()
    }
    others = ~np.eye(count, dtype=bool)

    def statistic(people):
        change = np.abs(colour["last"] - colour["first"])[people]
        found = {
            "colour_drift": float(change.mean()),
            "sharpness": float(energy["last"][people].sum() / energy["first"][people].sum()),
        }
        for name, table in distance.items():
            own = np.diag(table)[people].mean()
            found[f"portrait_distance_{name}"] = float(own)
            stranger = np.concatenate([table[i][others[i]] for i in people])
            found[f"identity_{name}"] = float(own / stranger.mean()) if count > 1 else 0.0
        return found

    ends_of = interval(statistic, count, seed=seed)
    return statistic(np.arange(count)) | {"interval": {k: list(v) for k, v in ends_of.items()}}


def contact_sheet(
    frames: Frames, truth: Truth, rows: int = 6, columns: int = 12
) -> UInt8[np.ndarray, "_ _ 3"]:
    """Pairs of rows, truth above generated; the portrait comes first."""
    shown = np.linspace(0, frames.shape[1] - 1, columns).astype(int)
    lines = []
    for i in range(min(rows, len(frames))):
        for source in (truth.frames, frames):
            lines.append(np.concatenate([truth.portrait[i], *source[i, shown]], axis=1))
    return np.concatenate(lines, axis=0)


def _portrait(clip: ClipRecord) -> np.ndarray:
    return clip.frames[0] if clip.portrait is None else clip.portrait


def _openings(frames: Frames, truth: Truth, probe: MouthProbe) -> Float[np.ndarray, "b T"]:
    boxes = truth.resting_box.astype(np.float32)
    return np.stack(
        [
            probe.predict(clip, np.repeat(box[None], len(clip), 0))
            for clip, box in zip(frames, boxes, strict=True)
        ]
    )


def _change(frames: Frames, order: int) -> Float[np.ndarray, "b t"]:
    """Mean absolute difference of some order from frame to frame."""
    return np.stack(
        [np.abs(np.diff(clip.astype(np.float32), order, axis=0)).mean((1, 2, 3)) for clip in frames]
    )


def _by_phase(change: Float[np.ndarray, "b t"]) -> Float[np.ndarray, "b 4"]:
    return np.stack([change[:, phase::4].mean(1) for phase in range(4)], axis=1)


def _square_error(frames: Frames, true: Frames) -> Float[np.ndarray, " b"]:
    pairs = zip(frames, true, strict=True)
    return np.array([np.square(a.astype(np.float64) - b).mean() for a, b in pairs])


def _lip_measures(opening: np.ndarray, true: np.ndarray) -> dict[str, np.ndarray]:
    """Correlations of every clip with its own truth at every lag, and with that of the others."""
    opening, true = opening.astype(np.float64), true.astype(np.float64)
    others = [_correlations(opening, np.roll(true, k, axis=0), 0) for k in range(1, len(true))]
    return {
        "lips": np.stack([_correlations(opening, true, lag) for lag in _LAGS], axis=1),
        "lips_other": np.nanmean(others, axis=0) if others else np.zeros(1),
        "amplitude": opening.std(1) / (true.std(1) + _SMALL),
    }


def _correlations(opening: np.ndarray, true: np.ndarray, lag: int) -> Float[np.ndarray, " b"]:
    """Correlation of `opening[t + lag]` with `true[t]`, clip by clip."""
    count = true.shape[1]
    found = []
    for ours, theirs in zip(opening, true, strict=True):
        a, b = ours[max(0, lag) : count + min(0, lag)], theirs[max(0, -lag) : count - max(0, lag)]
        if b.std() <= 1e-4:
            found.append(np.nan)  # a clip of silence says nothing
        else:
            found.append(np.corrcoef(a, b)[0, 1] if a.std() > _SMALL else 0.0)
    return np.array(found)


def _distances(frames: Frames, truth: Truth) -> tuple[np.ndarray, np.ndarray]:
    """Distances of mean pictures from their own portraits, and mean ones from other portraits."""
    mean = np.stack([clip.astype(np.float32).mean(0) for clip in frames])
    portrait = truth.portrait.astype(np.float32)
    distance = np.abs(mean[:, None] - portrait[None]).mean((2, 3, 4))
    is_other = truth.person[:, None] != truth.person[None]
    others = np.where(is_other, distance, 0).sum(1) / np.maximum(is_other.sum(1), 1)
    return np.diag(distance), np.where(is_other.any(1), others, np.nan)

"""Scores of generated talking people against the renderer's truth."""

from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int, UInt8

from jax_avatar.data.records import ClipRecord
from jax_avatar.evaluation.mouth_probe import MouthProbe
from jax_avatar.models.light_vae import LightVAE
from jax_avatar.models.params import merge, split

__all__ = [
    "Truth",
    "contact_sheet",
    "fit_probe",
    "reconstruct",
    "score",
    "score_stream",
]

Frames = UInt8[np.ndarray, "b T H W 3"]
_LAGS = range(-6, 7)


@dataclass(frozen=True)
class Truth:
    """What clips really look like."""

    frames: Frames
    portrait: UInt8[np.ndarray, "b H W 3"]
    resting_box: Float[np.ndarray, "b 4"]  # where the mouth usually is
    lip_gap: Float[np.ndarray, "b T"]
    person: Int[np.ndarray, " b"]

    @classmethod
    def from_clips(
        cls, clips: Sequence[ClipRecord], start: int = 0, stop: int | None = None
    ) -> "Truth":
        """Frames `start` to `stop` of clips of equal length."""
        part = slice(start, stop)
        return cls(
            frames=np.stack([clip.frames[part] for clip in clips]),
            portrait=np.stack([clip.portrait for clip in clips]),
            resting_box=np.stack([np.median(clip.mouth_box, axis=0) for clip in clips]),
            lip_gap=np.stack([clip.lip_gap[part] for clip in clips]),
            person=np.array([clip.person_id for clip in clips]),
        )


def reconstruct(vae: LightVAE, frames: Frames) -> Frames:
    """Encoded and decoded again: what remains of the truth in the latents."""
    structure, params = split(vae)

    @jax.jit
    def again(params, video):
        vae = merge(structure, params)
        decoded = vae.decode(vae.encode(video.astype(jnp.float32) / 127.5 - 1))
        return jnp.round((jnp.clip(decoded, -1, 1) + 1) * 127.5).astype(jnp.uint8)

    return np.concatenate([np.asarray(again(params, clip[None])) for clip in frames])


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


def score(frames: Frames, truth: Truth, probe: MouthProbe) -> dict[str, float]:
    """Scores of generated clips.

    Returns:
        `lip_r`: Pearson correlation of the opening of the generated mouth with the truth, mean of
        the clips; `lip_r_other`: with the truth of every other clip, which should be near zero;
        `lip_lag_frames`: shift at which the mean correlation is highest, positive if the picture
        is late; `lip_r_best`: there; `lip_amplitude`: deviation of the opening over the truth's;
        `identity`: distance of the mean picture from the portrait's own person over that from
        other people, 0 is perfect and 1 a stranger; `motion`: change from frame to frame over the
        truth's; `flicker`: how much that change itself changes, over the truth's; `latent_jump`:
        change at borders of latents over the change inside them.
    """
    opening = _openings(frames, truth, probe)
    true = truth.lip_gap
    curve = {lag: _mean_correlation(opening, true, lag) for lag in _LAGS}
    best = max(curve, key=curve.get)
    change, true_change = _change(frames, 1), _change(truth.frames, 1)
    # Every fourth change crosses a border; which one depends on the first frame.
    phases = np.array([change[:, phase::4].mean() for phase in range(4)])
    return {
        "lip_r": curve[0],
        "lip_r_best": curve[best],
        "lip_lag_frames": float(best),
        "lip_r_other": float(
            np.mean(
                [
                    _mean_correlation(opening, np.roll(true, shift, axis=0), 0)
                    for shift in range(1, len(true))
                ]
            )
        ),
        "lip_amplitude": float(np.median(opening.std(1) / (true.std(1) + 1e-6))),
        "identity": _identity(frames, truth),
        "motion": float(change.mean() / true_change.mean()),
        "flicker": float(_change(frames, 2).mean() / _change(truth.frames, 2).mean()),
        "latent_jump": float(phases.max() / max(np.sort(phases)[:3].mean(), 1e-6)),
    }


def score_stream(
    frames: Frames, portrait: UInt8[np.ndarray, "b H W 3"], window: int
) -> dict[str, float]:
    """What a long stream does to the picture: last `window` frames against the first.

    Returns:
        `colour_drift`: change of the mean colour in grey levels; `sharpness`: gradient energy over
        the first window's; `portrait_distance_first` and `_last`: mean absolute difference of the
        windows' mean pictures from the portrait, in grey levels; `identity_first` and `_last`:
        that distance over the distance from the other portraits, 1 is a stranger.
    """
    first, last = (part.astype(np.float32) for part in (frames[:, :window], frames[:, -window:]))
    still = portrait.astype(np.float32)

    def sharpness(part):
        return np.abs(np.diff(part, axis=2)).mean() + np.abs(np.diff(part, axis=3)).mean()

    def to_portraits(part):
        return np.abs(part.mean(1)[:, None] - still[None]).mean((2, 3, 4))

    def identity(part):
        distance = to_portraits(part)
        own = np.eye(len(distance), dtype=bool)
        return float(distance[own].mean() / distance[~own].mean()) if len(distance) > 1 else 0.0

    return {
        "colour_drift": float(np.abs(last.mean((1, 2, 3)) - first.mean((1, 2, 3))).mean()),
        "sharpness": float(sharpness(last) / sharpness(first)),
        "portrait_distance_first": float(np.diag(to_portraits(first)).mean()),
        "portrait_distance_last": float(np.diag(to_portraits(last)).mean()),
        "identity_first": identity(first),
        "identity_last": identity(last),
    }


def contact_sheet(
    frames: Frames, truth: Truth, rows: int = 6, columns: int = 12
) -> UInt8[np.ndarray, "H W 3"]:
    """Pairs of rows, truth above generated; the portrait comes first."""
    shown = np.linspace(0, frames.shape[1] - 1, columns).astype(int)
    lines = []
    for i in range(min(rows, len(frames))):
        for source in (truth.frames, frames):
            lines.append(np.concatenate([truth.portrait[i], *source[i, shown]], axis=1))
    return np.concatenate(lines, axis=0)


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
    return np.abs(np.diff(frames.astype(np.float32), order, axis=1)).mean((2, 3, 4))


def _mean_correlation(opening: np.ndarray, true: np.ndarray, lag: int) -> float:
    """Mean over clips of the correlation of `opening[t + lag]` with `true[t]`."""
    count = true.shape[1]
    found = []
    for ours, theirs in zip(opening, true, strict=True):
        a, b = ours[max(0, lag) : count + min(0, lag)], theirs[max(0, -lag) : count - max(0, lag)]
        if b.std() > 1e-4:  # a clip of silence says nothing
            found.append(np.corrcoef(a, b)[0, 1] if a.std() > 1e-6 else 0.0)
    return float(np.mean(found))


def _identity(frames: Frames, truth: Truth) -> float:
    """Own distance over the mean distance to other people, between mean pictures and portraits."""
    mean = frames.astype(np.float32).mean(1)
    portrait = truth.portrait.astype(np.float32)
    distance = np.abs(mean[:, None] - portrait[None]).mean((2, 3, 4))
    person = truth.person
    is_other = person[:, None] != person[None]
    return float(np.diag(distance).mean() / distance[is_other].mean())

"""Scores of a VAE that moves a portrait, against the rendered truth of held-out people.

frames, truth --> PSNR, sharpness, lids, lips, speed of one clip
clips ----------> means with bootstrap intervals
"""

from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image

from jax_avatar.data.talking_people.head_motion import LIDS, SCALE, index
from jax_avatar.data.talking_people.moved_portraits import WINDOW, MovedPortrait
from jax_avatar.evaluation.mouth_probe import MouthProbe
from jax_avatar.evaluation.scores import interval
from jax_avatar.pixels import frame_psnr

__all__ = ["PROBE_SIDE", "blinks", "clip_scores", "fit_probes", "means", "resized"]

PROBE_SIDE = 96
"""Pixels at which lips and lids are read, and speed is measured."""

_CLOSED, _WIDE = 0.4, 0.06  # lids, and gap of the lips in heights of the head
_Frames = UInt8[np.ndarray, "T H W 3"]


def clip_scores(
    frames: _Frames, truth: MovedPortrait, lips: MouthProbe, lids: MouthProbe | None = None
) -> dict[str, float]:
    """Scores of the frames of one clip.

    Args:
        frames: as many as the truth has, of its size.
        truth: frames one after the other, whole windows.
        lips: reads the gap of the lips.
        lids: reads how far they are closed.

    Returns:
        `psnr`, `face_psnr` (boxes of mouth and eyes), `above_still` (PSNR over that of the portrait
        unmoved), `sharp` and `face_sharp` (energy of the gradient over the truth's), `closed_lid`
        and `wide_mouth` (PSNR in the boxes of eyes and mouth in such frames; missing without any),
        `lip_r` and `lip_amplitude`, `lid_r` and `lid_amplitude`, `motion` (change per frame over
        the truth's), `jump` (share of it between windows, over the truth's; missing without any).
    """
    side = frames.shape[1]
    mouth, *eyes = _inside(truth.boxes, side).swapaxes(0, 1)
    eyes = np.maximum(*eyes)
    face = np.maximum(mouth, eyes)
    error = ((frames.astype(np.float32) - truth.frames) ** 2).mean(-1)
    still = ((truth.portrait.astype(np.float32) - truth.frames) ** 2).mean(-1)
    row = dict(
        psnr=frame_psnr(error).mean(),
        face_psnr=frame_psnr(error, face).mean(),
        above_still=(frame_psnr(error) - frame_psnr(still)).mean(),
        sharp=_sharpness(frames, truth.frames, np.ones_like(face)),
        face_sharp=_sharpness(frames, truth.frames, face),
    )
    closed = blinks(truth)
    if (is_closed := closed > _CLOSED).any():
        row["closed_lid"] = frame_psnr(error, eyes)[is_closed].mean()
    if (is_wide := truth.lip_gap > _WIDE).any():
        row["wide_mouth"] = frame_psnr(error, mouth)[is_wide].mean()
    small, boxes = resized(frames, PROBE_SIDE), truth.boxes * PROBE_SIDE
    gap = lips.predict(small, boxes[:, 0])
    row["lip_r"], row["lip_amplitude"] = _agreement(gap, truth.lip_gap)
    if lids is not None and is_closed.any():
        read = (lids.predict(small, boxes[:, 1]) + lids.predict(small, boxes[:, 2])) / 2
        row["lid_r"], row["lid_amplitude"] = _agreement(read, closed)
    change, true_change = (_change(x) for x in (small, resized(truth.frames, PROBE_SIDE)))
    row["motion"] = change.mean() / true_change.mean()
    if change.any():
        at_border, truly = (x[WINDOW - 1 :: WINDOW].mean() for x in (change, true_change))
        row["jump"] = at_border / truly / row["motion"]
    return {name: float(value) for name, value in row.items()}


def fit_probes(
    people: Sequence[MovedPortrait], *, num_steps: int = 1000
) -> tuple[MouthProbe, MouthProbe]:
    """Probes of lips and lids, fitted to true frames of other people."""
    frames = np.concatenate([resized(person.frames, PROBE_SIDE) for person in people])
    boxes = np.concatenate([person.boxes for person in people]) * PROBE_SIDE
    gap = np.concatenate([person.lip_gap for person in people])
    closed = np.concatenate([blinks(person) for person in people])
    lips = MouthProbe.fit(frames, boxes[:, 0], gap, num_steps=num_steps)
    both, lid_boxes = np.concatenate([frames, frames]), np.concatenate([boxes[:, 1], boxes[:, 2]])
    lids = MouthProbe.fit(both, lid_boxes, np.tile(closed, 2), num_steps=num_steps)
    return lips, lids


def means(rows: Sequence[Mapping[str, float]]) -> dict[str, tuple[float, float, float]]:
    """Mean of each score over clips that have it, with its bootstrap interval of 95 %."""
    found = {}
    for name in dict.fromkeys(name for row in rows for name in row):
        values = np.array([row[name] for row in rows if name in row])
        ends = interval(lambda index, v=values: {"mean": v[index].mean()}, len(values))
        found[name] = (float(values.mean()), *ends["mean"])
    return found


def blinks(truth: MovedPortrait) -> Float[np.ndarray, " T"]:
    """Closure of the lids in each frame, 0 open to 1 closed, mean of both eyes."""
    lids = index(*LIDS)
    own = truth.motion[np.arange(len(truth.offset)), truth.offset]
    return (own[:, lids] * SCALE[lids]).mean(-1)


def resized(frames: _Frames, side: int) -> UInt8[np.ndarray, "T h w 3"]:
    """Frames at another size, averaged where they shrink."""
    if frames.shape[1] == side:
        return frames
    how = Image.Resampling.BOX if side < frames.shape[1] else Image.Resampling.BICUBIC
    return np.stack([np.asarray(Image.fromarray(f).resize((side, side), how)) for f in frames])


def _inside(boxes: Float[np.ndarray, "T 3 4"], side: int, margin: float = 0.02) -> np.ndarray:
    """1 in the boxes of mouth and eyes: T 3 H W."""
    at = (np.arange(side) + 0.5) / side
    left, top, right, bottom = (boxes[..., i, None] for i in range(4))
    x = (at > left - margin) & (at < right + margin)
    y = (at > top - margin) & (at < bottom + margin)
    return (y[..., :, None] & x[..., None, :]).astype(np.float32)


def _sharpness(frames: _Frames, truth: _Frames, where: Float[np.ndarray, "T H W"]) -> float:
    def energy(x):
        x = x.astype(np.float32)
        dx, dy = np.diff(x, axis=2)[:, :-1], np.diff(x, axis=1)[:, :, :-1]
        return ((dx**2 + dy**2).sum(-1) * where[:, :-1, :-1]).sum()

    return float(energy(frames) / energy(truth))


def _agreement(read: np.ndarray, truth: np.ndarray) -> tuple[float, float]:
    """Correlation, and spread over the truth's."""
    return float(np.corrcoef(read, truth)[0, 1]), float(read.std() / truth.std())


def _change(frames: _Frames) -> Float[np.ndarray, " t"]:
    return np.abs(np.diff(frames.astype(np.float32), axis=0)).mean((1, 2, 3))

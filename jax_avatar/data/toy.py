"""Drawn faces that open their mouths when a tone is loud: clips without data, to see machinery run.

syllables --> loudness of a tone
        +---> opening of an ellipse in a face of flat colours
"""

import numpy as np

from jax_avatar.data.records import SPLITS, ClipRecord

__all__ = ["toy_clips"]

_RATE = 16000
_TAIL = 1280  # samples after the last frame, as in every clip
_LARGEST_GAP = 0.12  # of the lips, over the height of the head


def toy_clips(
    split: str,
    *,
    count: int = 8,
    size: int = 96,
    num_frames: int = 37,
    fps: int = 16,
    seed: int = 0,
) -> list[ClipRecord]:
    """Clips of as many people; the same for the same arguments.

    Args:
        split: one of `SPLITS`; its people are in no other.
        count: clips.
        size: pixels of each side.
        num_frames: video frames of each.
        fps: frames per second.
        seed: of faces and voices.
    """
    rng = np.random.default_rng([seed, SPLITS.index(split)])
    return [_clip(rng, split, person, size, num_frames, fps) for person in range(count)]


def _clip(rng, split, person, size, num_frames, fps) -> ClipRecord:
    loudness = _syllables(rng, num_frames * _RATE // fps + _TAIL)
    time = np.arange(loudness.size) / _RATE
    tones = sum(np.sin(2 * np.pi * rng.uniform(90, 220) * k * time) / k for k in range(1, 6))
    gap = _LARGEST_GAP * loudness[np.arange(num_frames) * _RATE // fps]
    draw = _face(rng, size)
    box = np.array([0.36, 0.62, 0.64, 0.86], np.float32) * size
    return ClipRecord(
        frames=np.stack([draw(g) for g in gap]),
        portrait=draw(0.0),
        wave=(6000 * loudness * tones).astype(np.int16),
        units=np.zeros((num_frames, 1), np.float16),
        lip_gap=gap.astype(np.float32),
        mouth_box=np.tile(box, (num_frames, 1)),
        pose=np.zeros((num_frames, 8), np.float32),
        phones=(),
        actions=(),
        person_id=1000 * SPLITS.index(split) + person,
        voice="tone",
        split=split,
        style="toy",
        fps=fps,
    )


def _syllables(rng, samples: int) -> np.ndarray:
    """A loudness in [0, 1] that rises and falls some four times a second."""
    loudness, start = np.zeros(samples), int(rng.integers(_RATE // 8))
    while start < samples:
        length = int(rng.integers(_RATE // 8, _RATE // 3))
        rise = np.sin(np.pi * np.arange(length) / length) ** 2 * rng.uniform(0.4, 1)
        end = min(samples, start + length)
        loudness[start:end] = rise[: end - start]
        start = end + int(rng.integers(_RATE // 8))
    return loudness


def _face(rng, size: int):
    """Returns `opening of the lips -> picture [size size 3]` of one person."""
    colours = rng.uniform(0.15, 0.95, (4, 3))  # background, skin, eyes, lips
    wide, eye_row = rng.uniform(0.24, 0.34), rng.uniform(0.36, 0.44)
    y, x = (np.mgrid[:size, :size] + 0.5) / size

    def inside(row, column, height, width):
        square = ((y - row) / height) ** 2 + ((x - column) / width) ** 2
        return np.clip((1 - square) * size / 6, 0, 1)[..., None]  # soft edges

    def draw(gap: float) -> np.ndarray:
        picture = np.broadcast_to(colours[0], (size, size, 3))
        shapes = [
            (0.5, 0.5, 0.4, wide, colours[1]),
            (eye_row, 0.5 - wide / 2, 0.03, 0.05, colours[2]),
            (eye_row, 0.5 + wide / 2, 0.03, 0.05, colours[2]),
            (0.74, 0.5, 0.02 + 0.8 * gap, 0.12, colours[3]),
            (0.74, 0.5, 1e-3 + 0.7 * gap, 0.1, np.full(3, 0.1)),
        ]
        for *place, colour in shapes:
            cover = inside(*place)
            picture = (1 - cover) * picture + cover * colour
        return np.round(255 * picture).astype(np.uint8)

    return draw

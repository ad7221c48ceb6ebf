"""Clips as the transformer trains on them: encoded once, then kept in memory.

frames, portrait --VAE--> latents, reference      wave --speech encoder--> features
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np

from jax_avatar.data.records import ClipRecord
from jax_avatar.shapes import Array

__all__ = ["LatentClips", "encode_clips", "mouth_cells", "random_clips"]


@dataclass(frozen=True)
class LatentClips:
    """Encoded clips in memory, small enough to be kept whole.

    Attributes:
        latent: of the clips' moving frames (without latent 0), `N t h w c` float16.
        reference: of the portraits, `N 1 h w c` float16.
        features: of the speech, four video frames per latent, `N T k a` float16.
        mouth: where the mouth is, `N t h w`.
        lip_gap: opening of the lips over the height of the head, `N T`.
        person: number of the person in each clip, `N`.
    """

    latent: np.ndarray
    reference: np.ndarray
    features: np.ndarray
    mouth: np.ndarray
    lip_gap: np.ndarray
    person: np.ndarray

    def __post_init__(self):
        count, frames = self.latent.shape[:2]
        if self.features.shape[1] != 4 * frames or self.lip_gap.shape[1] != 4 * frames:
            raise ValueError(
                f"{frames} latents came with features of {self.features.shape[1]} and lip gaps of "
                f"{self.lip_gap.shape[1]} video frames; four frames per latent are expected."
            )
        for name in ("reference", "features", "mouth", "lip_gap", "person"):
            if len(getattr(self, name)) != count:
                raise ValueError(f"{len(getattr(self, name))} {name} came for {count} clips")

    def __len__(self) -> int:
        return len(self.latent)

    def take(self, index: np.ndarray | slice) -> "LatentClips":
        """Some of the clips."""
        return LatentClips(**{name: getattr(self, name)[index] for name in self.__annotations__})

    def save(self, path: str | Path) -> None:
        """Writes one archive."""
        np.savez(path, **{name: getattr(self, name) for name in self.__annotations__})

    @classmethod
    def load(cls, path: str | Path) -> "LatentClips":
        """Reads what `save` wrote."""
        with np.load(path, allow_pickle=False) as archive:
            return cls(**{name: archive[name] for name in cls.__annotations__})


def encode_clips(
    clips: Iterable[ClipRecord],
    encode_video: Callable[[Array], Array],
    encode_speech: Callable[[Array, int], Array],
    *,
    stride: int = 8,
    phases: int = 1,
) -> LatentClips:
    """Encodes clips one after the other.

    A latent stands for four frames. Encoding a clip again from its second, third and fourth frame
    gives other latents of the same motion, up to four times as many.

    Args:
        clips: of equal length, `1 + 4n` frames.
        encode_video: `[1 T H W 3] -> [1 t h w c]`, weights bound.
        encode_speech: `(wave [1 1 N], frames) -> [1 1 frames k a]`, weights bound.
        stride: pixels per latent cell.
        phases: 1 to 4, how often every clip is encoded, each time from one frame later.
    """
    encode_video = jax.jit(encode_video)
    encode_speech = jax.jit(encode_speech, static_argnums=1)
    rows = {name: [] for name in LatentClips.__annotations__}
    for clip in clips:
        frames = (len(clip.frames) - phases) // 4 * 4
        size = (clip.frames.shape[1] // stride, clip.frames.shape[2] // stride)
        portrait = clip.portrait[None, None].astype(np.float32) / 127.5 - 1
        reference = np.asarray(encode_video(portrait))[0].astype(np.float16)
        # The wave is heard from its start, as in a stream.
        wave = clip.wave[None, None].astype(np.float32) / 32768
        features = np.asarray(encode_speech(wave, len(clip.frames)))[0, 0].astype(np.float16)
        for phase in range(phases):
            video = clip.frames[None, phase : phase + 1 + frames].astype(np.float32) / 127.5 - 1
            moving = slice(phase + 1, phase + 1 + frames)
            rows["latent"].append(np.asarray(encode_video(video))[0, 1:].astype(np.float16))
            rows["reference"].append(reference)
            rows["features"].append(features[moving])
            rows["mouth"].append(mouth_cells(clip.mouth_box[moving], size, stride))
            rows["lip_gap"].append(clip.lip_gap[moving].astype(np.float32))
            rows["person"].append(clip.person_id)
    return LatentClips(**{name: np.stack(values) for name, values in rows.items()})


def mouth_cells(
    mouth_box: np.ndarray, size: tuple[int, int], stride: int, margin: float = 2.0
) -> np.ndarray:
    """Latent cells that the mouth's boxes touch in any of a latent's four frames.

    Args:
        mouth_box: `[4t 4]` left, top, right, bottom in pixels.
        size: latent rows and columns.
        stride: pixels per latent cell.
        margin: pixels by which the boxes are widened.
    """
    boxes = mouth_box.reshape(-1, 4, 4)
    low, high = boxes[..., :2].min(1) - margin, boxes[..., 2:].max(1) + margin
    rows, cols = np.arange(size[0])[None], np.arange(size[1])[None]
    row = (rows * stride < high[:, 1:]) & ((rows + 1) * stride > low[:, 1:])
    col = (cols * stride < high[:, :1]) & ((cols + 1) * stride > low[:, :1])
    return row[:, :, None] & col[:, None, :]


def random_clips(
    count: int,
    frames: int,
    grid: tuple[int, int],
    channels: int,
    states: tuple[int, int],
    *,
    seed: int = 0,
) -> LatentClips:
    """Clips of noise, to see machinery run without data.

    Args:
        count: clips.
        frames: latent frames of each.
        grid: latent rows and columns.
        channels: of the latents.
        states: hidden states and channels of the speech features.
        seed: of the noise.
    """
    rng = np.random.default_rng(seed)

    def noise(*shape):
        return rng.standard_normal((count, *shape)).astype(np.float16)

    return LatentClips(
        latent=noise(frames, *grid, channels),
        reference=noise(1, *grid, channels),
        features=noise(4 * frames, *states),
        mouth=np.zeros((count, frames, *grid), bool),
        lip_gap=np.zeros((count, 4 * frames), np.float32),
        person=np.arange(count),
    )

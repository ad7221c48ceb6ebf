"""Encoded clips to train on: arrays in memory, or the records of an encoded data set."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np

from jax_avatar.data.encoded import EncodedClip, negative_rows, open_encoded
from jax_avatar.data.shards import RecordSource

__all__ = [
    "Clips",
    "LatentClips",
    "StoredClips",
    "load_encoded",
    "random_clips",
]

EncodeSpeech = Callable[[np.ndarray, int], np.ndarray]


@runtime_checkable
class Clips(Protocol):
    """Encoded clips, wherever they are. Latent 0 of a clip is never part of a window.

    Attributes:
        lengths: latents of every clip, without latent 0.
        person: number of the person in every clip.
        grid: rows and columns of a latent.
        channels: of a latent.
        states: hidden states and channels of the speech features.
        fps: video frames per second; 0 for clips of noise.
        text_width: channels of the text rows; 0 without text.
        null_text: rows of the negative prompt, `p f`, or None.
        has_first: whether `moving` brings latent 0, too, as `first`.
        has_lips: whether the place and the opening of the mouth are known.
        content_hash: of the data; "" for clips that are nowhere on disk.
    """

    lengths: np.ndarray
    person: np.ndarray
    grid: tuple[int, int]
    channels: int
    states: tuple[int, int]
    fps: int
    text_width: int
    null_text: np.ndarray | None
    has_first: bool
    has_lips: bool
    content_hash: str

    def __len__(self) -> int: ...

    def moving(self, index: int) -> dict[str, Any]:
        """Arrays of one clip after latent 0 and frame 0, candidate portraits, text rows."""

    def take(self, index: np.ndarray | slice) -> "LatentClips":
        """Some of the clips, in memory, each with one portrait and as long as the shortest."""


@dataclass(frozen=True)
class LatentClips:
    """Encoded clips in memory, of equal length, with one portrait each.

    Attributes:
        latent: of the clips' moving frames (without latent 0), `N t h w c`.
        reference: of the portraits, `N 1 h w c`.
        features: of the speech, four video frames per latent, `N T k a`.
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

    fps, text_width, null_text, has_lips, content_hash = 0, 0, None, True, ""
    has_first = False

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

    @property
    def lengths(self) -> np.ndarray:
        """Latents of every clip."""
        return np.full(len(self), self.latent.shape[1])

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of a latent."""
        return self.latent.shape[2:4]

    @property
    def channels(self) -> int:
        """Channels of a latent."""
        return self.latent.shape[-1]

    @property
    def states(self) -> tuple[int, int]:
        """Hidden states and channels of the speech features."""
        return self.features.shape[2:]

    def moving(self, index: int) -> dict[str, Any]:
        """Implements `Clips`."""
        names = ("latent", "reference", "features", "mouth", "lip_gap")
        return {name: getattr(self, name)[index] for name in names} | {"reference_frames": (-1,)}

    def take(self, index: np.ndarray | slice) -> "LatentClips":
        """Implements `Clips`."""
        return LatentClips(**{name: getattr(self, name)[index] for name in self.__annotations__})


class StoredClips:
    """Clips of an encoded data set, read on access; see `Clips`."""

    has_first = True

    def __init__(
        self,
        records: Sequence[EncodedClip] | RecordSource,
        index: dict[str, Any],
        split: str,
        *,
        null_text: np.ndarray | None = None,
        encode_speech: EncodeSpeech | None = None,
        states: tuple[int, int] | None = None,
    ):
        """Binds records to their index entries.

        Args:
            records: of the split.
            index: of the data set.
            split: its name.
            null_text: rows of the negative prompt.
            encode_speech: `(wave [n] int16, frames) -> features [T k a]` of the video frames from
                the start of the wave; needed where the data set has no features.
            states: hidden states and channels that `encode_speech` makes.
        """
        shards = index["splits"][split]
        self.records, self._encode_speech = records, encode_speech
        self.lengths = np.concatenate([shard["latents"] for shard in shards]) - 1
        self.person = np.concatenate([shard["people"] for shard in shards])
        self.grid, self.channels = tuple(index["grid"]), index["channels"]
        self.fps, self.content_hash = index["fps"], index["hash"]
        self.text_width, self.null_text = index["text_width"], null_text
        self.has_lips = {"mouth", "lip_gap"} <= set(index["fields"])
        stored = index["states"]
        if stored is None and encode_speech is None:
            raise ValueError(
                "the encoded clips have no speech features and no speech encoder was given; give "
                "the model's folder, or encode them again with their features."
            )
        self.states = tuple(stored or states)
        if stored is not None:
            self._encode_speech = None  # so that other processes can read these clips, too

    def __len__(self) -> int:
        return len(self.lengths)

    def moving(self, index: int) -> dict[str, Any]:
        """Implements `Clips`."""
        clip = self.records[index]
        t, h, w, _ = clip.latent.shape
        frames = 4 * (t - 1)
        features = clip.features
        if features is None:
            # The whole wave is heard from its start, as in a stream, and then cut.
            heard = self._encode_speech(clip.wave, clip.first_frame + 1 + frames)
            features = heard[clip.first_frame :]
        moving = {
            "first": clip.latent[:1],
            "latent": clip.latent[1:],
            "reference": clip.reference,
            "reference_frames": clip.reference_frames,
            "features": features[1:],
            "mouth": np.zeros((t - 1, h, w), bool),
            "lip_gap": np.zeros(frames, np.float32),
        }
        if self.has_lips:
            moving |= {"mouth": clip.mouth[1:], "lip_gap": clip.lip_gap[1:]}
        return moving | ({} if clip.text is None else {"text": clip.text})

    def take(self, index: np.ndarray | slice) -> LatentClips:
        """Implements `Clips`."""
        chosen = np.arange(len(self))[index]
        shortest = int(self.lengths[chosen].min())
        clips = [self.moving(int(i)) for i in chosen]

        def stack(name, length):
            return np.stack([clip[name][:length] for clip in clips])

        return LatentClips(
            latent=stack("latent", shortest).astype(np.float16),
            reference=stack("reference", 1).astype(np.float16),
            features=stack("features", 4 * shortest).astype(np.float16),
            mouth=stack("mouth", shortest),
            lip_gap=stack("lip_gap", 4 * shortest),
            person=self.person[chosen],
        )


def load_encoded(
    folder: str | Path,
    split: str,
    *,
    weights: dict[str, str] | None = None,
    encode_speech: EncodeSpeech | None = None,
    states: tuple[int, int] | None = None,
) -> StoredClips:
    """Opens a split of an encoded data set.

    Args:
        folder: written by `launch/prepare_data.py encode`.
        split: its name.
        weights: network -> hash of the weights in use, to be compared with those that encoded.
        encode_speech: see `StoredClips`.
        states: see `StoredClips`.

    Raises:
        ValueError: the folder is not a whole data set, or was encoded with other weights.
    """
    records, index = open_encoded(folder, split)
    used = index["settings"]["weights"]
    for name, value in (weights or {}).items():
        # Where the data has no features, any speech encoder may make them.
        if used.get(name, value) != value and not (name == "speech" and not index["states"]):
            raise ValueError(
                f"{folder} was encoded with {name} weights {used[name][:16]}, those of this run "
                f"are {value[:16]}; encode the clips with this model, or use the other one."
            )
    null_text = negative_rows(folder)
    return StoredClips(
        records, index, split, null_text=null_text, encode_speech=encode_speech, states=states
    )


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

"""Raw clips -> encoded data set: what the transformer trains on, computed once.

frames --VAE--> latents    portrait or some frames --VAE--> references
caption, timed actions --prompt encoder--> text rows    wave --speech encoder--> features
"""

import dataclasses
import itertools
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from jax_avatar.data.encoded import (
    NEGATIVE_PROMPT,
    EncodedClip,
    describe,
    encode_encoded,
    finish_index,
    start_index,
)
from jax_avatar.data.latents import StoredClips
from jax_avatar.data.records import SPLITS, ClipRecord, read_clips, read_manifest
from jax_avatar.data.shards import write_records
from jax_avatar.pixels import from_uint8
from jax_avatar.weights.encoders import Encoders
from jax_avatar.weights.files import save_weights

__all__ = [
    "EncodeConfig",
    "caption_of",
    "encode_clip",
    "encode_clips",
    "encode_data",
    "first_clip",
    "mouth_cells",
]

_CANDIDATES = 4  # portraits taken from a clip that has none of its own


@dataclass(frozen=True)
class EncodeConfig:
    """Settings of the encoding of clips.

    Attributes:
        phases: 1 to 4, how often a training clip is encoded, each time from one frame later: a
            latent stands for four frames, so this gives other latents of the same motion.
        clips_per_shard: records of a shard.
        store_features: keep the speech features; without them training computes them.
        reference_repeats: frames that a portrait is encoded as; its last latent is kept. 1 is what
            streams here, 5 what the official single-device pipeline does.
        negative_prompt: encoded once for the whole set, where there is a prompt encoder.
    """

    phases: int = 1
    clips_per_shard: int = 512
    store_features: bool = True
    reference_repeats: int = 1
    negative_prompt: str = ""

    def __post_init__(self):
        if not 1 <= self.phases <= 4:
            raise ValueError(f"phases {self.phases}: a latent has four frames, expected 1 to 4.")
        if self.reference_repeats % 4 != 1 or self.clips_per_shard < 1:
            raise ValueError(
                f"reference_repeats {self.reference_repeats} must be 1, 5, 9, ... and "
                f"clips_per_shard {self.clips_per_shard} at least 1."
            )


def encode_data(
    data: str | Path,
    out: str | Path,
    encoders: Encoders,
    config: EncodeConfig,
    *,
    splits: Sequence[str] = (),
    progress: bool = True,
) -> dict[str, Any]:
    """Encodes a folder of raw clips, shard by shard; what was finished before stays.

    Args:
        data: folder written by `launch/prepare_data.py people` or `videos`.
        out: folder of the encoded set.
        encoders: of the model.
        config: what is made of every clip.
        splits: to encode; all that the folder has if not given.
        progress: show a progress bar.

    Returns:
        The index.

    Raises:
        ValueError: the data are incomplete or do not fit the encoders, or `out` holds others.
    """
    data, out = Path(data), Path(out)
    manifest = read_manifest(data)
    if not manifest["complete"]:
        raise ValueError(f"{str(data)!r} is not complete; repeat the command that makes it.")
    splits = tuple(splits) or tuple(_present(data))
    if not splits:
        raise ValueError(f"{str(data)!r} holds no clips; prepare data there first.")
    sources = {split: read_clips(data, split) for split in splits}
    _check_rate(data, sources[splits[0]][0].fps, encoders.fps)
    start_index(
        out,
        {
            "data_hash": manifest["data_hash"],
            "weights": dict(encoders.hashes),
            "splits": splits,
            **dataclasses.asdict(config),
        },
    )
    if encoders.text:
        rows = np.asarray(encoders.text(config.negative_prompt))
        about = {"prompt": config.negative_prompt}
        save_weights(out, NEGATIVE_PROMPT, {"states": rows}, about, dtype="bfloat16")
    plan = {split: _plan(source, split, config, out) for split, source in sources.items()}
    total = sum(len(examples) for shards in plan.values() for examples in shards.values())
    with tqdm(total=total, unit="clip", disable=not progress) as bar:
        for split, shards in plan.items():
            for path, examples in shards.items():
                if not path.exists():
                    clips = _encode(sources[split], examples, split, encoders, config, bar.update)
                    write_records(path, clips)
                else:
                    bar.update(len(examples))
    return finish_index(out, {split: list(shards) for split, shards in plan.items()})


def _check_rate(data: Path, fps: int, expected: int) -> None:
    if fps != expected:
        raise ValueError(
            f"clips in {str(data)!r} have {fps} frames per second, this run config.fps={expected}, "
            "for which the speech encoder makes features; prepare the data with "
            f"--fps {expected}, or train at --config.fps={fps}."
        )


def first_clip(data: str | Path) -> ClipRecord:
    """A clip of a folder of raw clips, to see what they are.

    Raises:
        ValueError: there is none.
    """
    for split in _present(Path(data)):
        return read_clips(data, split)[0]
    raise ValueError(f"{str(data)!r} holds no clips; prepare data there first.")


def encode_clips(
    clips: Iterable[ClipRecord], encoders: Encoders, config: EncodeConfig | None = None
) -> StoredClips:
    """Encodes clips and keeps them in memory, for sets that are drawn in seconds."""
    config = config or EncodeConfig()
    records = [
        encode_clip(clip, encoders, config, phase=phase, source=f"{clip.split}-{i}")
        for i, clip in enumerate(clips)
        for phase in range(_phases(config, clip.split))
    ]
    entry = describe(records)
    index = {**entry.pop("kind"), "hash": "", "splits": {"memory": [entry]}}
    return StoredClips(
        records, index, "memory", encode_speech=encoders.features, states=encoders.states
    )


def encode_clip(
    clip: ClipRecord, encoders: Encoders, config: EncodeConfig, *, phase: int = 0, source: str = ""
) -> EncodedClip:
    """Encodes one clip.

    Args:
        clip: with at least five frames, and with sound.
        encoders: of the model.
        config: what is made of it.
        phase: frame to begin with, below `config.phases`.
        source: what the record is called, in messages too.

    Raises:
        ValueError: the clip is silent, of another rate or size, or has come out as NaN.
    """
    height, width = clip.frames.shape[1:3]
    if not len(clip.wave):
        raise ValueError(f"clip {source} has no sound; leave it out, avatars learn from speech.")
    if clip.fps != encoders.fps:
        raise ValueError(
            f"clip {source} has {clip.fps} frames per second; expected {encoders.fps}."
        )
    try:
        grid = encoders.latent_grid(height, width)
    except ValueError as error:
        raise ValueError(f"clip {source}: {error}") from None
    frames = (len(clip.frames) - _phases(config, clip.split)) // 4 * 4 + 1
    shown = slice(phase, phase + frames)
    portraits, places = _portraits(clip, shown)
    stills = [np.repeat(portrait[None], config.reference_repeats, 0) for portrait in portraits]
    lips = {}
    if clip.mouth_box is not None and clip.lip_gap is not None:
        boxes = clip.mouth_box[shown]
        boxes = np.concatenate([np.repeat(boxes[:1], 3, axis=0), boxes])
        cells = mouth_cells(boxes, grid, height // grid[0])
        lips = {"mouth": cells, "lip_gap": clip.lip_gap[shown]}
    caption = caption_of(clip.caption, clip.actions)
    features = None
    if config.store_features:
        # Heard from the start, as in a stream, whatever frame the record begins with.
        features = encoders.features(clip.wave, len(clip.frames))[shown]
    return EncodedClip(
        latent=_latents(encoders, portraits[0], clip.frames[shown]),
        reference=np.stack([_latents(encoders, still[0], still)[-1] for still in stills]),
        wave=clip.wave,
        text=np.asarray(encoders.text(caption)) if encoders.text else None,
        features=features,
        **({"mouth": None, "lip_gap": None} | lips),
        reference_frames=places,
        first_frame=phase,
        caption=caption,
        actions=clip.actions,
        fps=clip.fps,
        person=clip.person_id,
        source=clip.source or source,
    )


def _latents(encoders: Encoders, portrait: np.ndarray, frames: np.ndarray) -> np.ndarray:
    return np.asarray(encoders.video(from_uint8(portrait[None]), from_uint8(frames[None])))[0]


def caption_of(caption: str, actions: Sequence[tuple[str, float, float, str]]) -> str:
    """Prompt of a clip: its caption, and the timed actions."""
    said = caption or "A person talks to the camera."
    for _, start, end, what in actions:
        said += f" From {start:.1f} to {end:.1f} seconds, the person {what}."
    return said


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


def _present(data: Path) -> list[str]:
    return [split for split in SPLITS if any(data.glob(f"{split}-*.array_record"))]


def _phases(config: EncodeConfig, split: str) -> int:
    return config.phases if split == "train" else 1


def _plan(source, split: str, config: EncodeConfig, out: Path) -> dict[Path, list[tuple[int, int]]]:
    """Shards of a split, and which clip in which phase is in each."""
    phases = range(_phases(config, split))
    examples = [(i, phase) for i in range(len(source)) for phase in phases]
    size = config.clips_per_shard
    parts = [examples[i : i + size] for i in range(0, len(examples), size)]
    names = (f"{split}-{i:05d}-of-{len(parts):05d}.array_record" for i in range(len(parts)))
    return {out / name: part for name, part in zip(names, parts, strict=True)}


def _encode(source, examples, split, encoders, config, advance) -> Iterator[bytes]:
    clip, index = None, None
    for i, phase in examples:
        if i != index:
            clip, index = source[i], i
        name = f"{split}-{i}"
        yield encode_encoded(encode_clip(clip, encoders, config, phase=phase, source=name))
        advance(1)


def _portraits(clip: ClipRecord, shown: slice) -> tuple[list[np.ndarray], tuple[int, ...]]:
    """The clip's portrait, or some of its frames and where they are in the record."""
    if clip.portrait is not None:
        return [clip.portrait], (-1,)
    count = shown.stop - shown.start
    rng = np.random.default_rng(zlib.crc32(clip.frames[0].tobytes()))
    # One from every quarter, so that whatever the window some lie outside of it.
    edges = np.linspace(0, count, _CANDIDATES + 1).astype(int)
    places = tuple(int(rng.integers(a, max(a + 1, b))) for a, b in itertools.pairwise(edges))
    return [clip.frames[shown.start + place] for place in places], places

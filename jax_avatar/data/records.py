"""Clips of talking people on disk: ArrayRecord shards of uncompressed NumPy archives.

```
<split>-00003-of-00040.array_record     one shard, written whole or not at all
manifest.json                           counts, seed, names of the face units, hash of the data
```
"""

import dataclasses
import hashlib
import io
import itertools
import json
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from jax_avatar.data.shards import RecordSource, write_records
from jax_avatar.weights.checksums import file_sha256

MANIFEST = "manifest.json"
SPLITS = ("train", "held_out_person", "held_out_voice", "held_out_both", "cartoon")

_ARRAYS = ("frames", "portrait", "wave", "units", "lip_gap", "mouth_box", "pose")
_PIXELS = ("frames",)


@dataclasses.dataclass(frozen=True, eq=False)
class ClipRecord:
    """One clip: frames, sound, and the ground truth both were rendered from, where known."""

    frames: np.ndarray  # [T H W 3] uint8; frame i shows time i / fps of the wave
    wave: np.ndarray  # [samples] int16, 16 kHz, the clip and some samples after its end
    fps: int
    split: str
    style: str  # "people", "cartoon" or "video"
    person_id: int
    source: str = ""  # where it comes from; rendered clips say it by split and seeds
    caption: str = ""  # what a video's own caption says
    voice: str = ""
    portrait: np.ndarray | None = None  # [H W 3] uint8, the person before it, mouth closed
    units: np.ndarray | None = None  # [T q] float16, face-unit weights in the manifest's order
    lip_gap: np.ndarray | None = None  # [T] float32, opening of the lips over the head's height
    mouth_box: np.ndarray | None = None  # [T 4] float32: left, top, right, bottom in pixels
    pose: np.ndarray | None = None
    # [T 8] float32: yaw, pitch, roll, shift right, up, near, gaze right, down
    phones: tuple[tuple[str, float, float], ...] = ()  # name, start and end in s of the wave
    actions: tuple[tuple[str, float, float, str], ...] = ()  # name, start, end, caption


def encode_clip(clip: ClipRecord) -> bytes:
    """Packs a clip; decoded by `decode_clip`."""
    arrays = {name: getattr(clip, name) for name in _ARRAYS}
    arrays = {name: value for name, value in arrays.items() if value is not None}
    # Differences in time are mostly zero, which the shard's compression makes small.
    for name in _PIXELS:
        arrays[name] = np.diff(arrays[name], axis=0, prepend=np.zeros_like(arrays[name][:1]))
    facts = {
        field.name: getattr(clip, field.name)
        for field in dataclasses.fields(clip)
        if field.name not in _ARRAYS
    }
    buffer = io.BytesIO()
    np.savez(buffer, facts=np.frombuffer(json.dumps(facts).encode(), np.uint8), **arrays)
    return buffer.getvalue()


def decode_clip(data: bytes) -> ClipRecord:
    """Unpacks what `encode_clip` made."""
    with np.load(io.BytesIO(data), allow_pickle=False) as archive:
        arrays = {name: archive[name] for name in _ARRAYS if name in archive}
        facts = json.loads(archive["facts"].tobytes())
    facts.pop("text", None)  # stored until 0.1
    for name in _PIXELS:
        for before, frame in itertools.pairwise(arrays[name]):
            frame += before  # some ten times as fast as a cumulative sum over the first axis
    facts["phones"] = tuple(tuple(phone) for phone in facts["phones"])
    facts["actions"] = tuple(tuple(action) for action in facts["actions"])
    return ClipRecord(**arrays, **facts)


def shard_path(folder: str | pathlib.Path, split: str, shard: int, num_shards: int) -> pathlib.Path:
    """Path of one shard of a split."""
    if split not in SPLITS:
        raise ValueError(f"split {split!r}: expected one of {', '.join(SPLITS)}")
    return pathlib.Path(folder) / f"{split}-{shard:05d}-of-{num_shards:05d}.array_record"


def write_shard(path: pathlib.Path, clips: Iterable[ClipRecord]) -> int:
    """Writes clips to a shard, whole or not at all.

    Returns:
        The number of clips.
    """
    return write_records(path, map(encode_clip, clips))


class ClipSource(RecordSource):
    """Random access to the clips of a split."""

    def __init__(self, paths: tuple[pathlib.Path, ...]):
        super().__init__(paths, decode_clip)


def read_clips(folder: str | pathlib.Path, split: str = "train") -> ClipSource:
    """Opens the clips of one split, also while more shards are being written.

    Args:
        folder: written by `launch/prepare_data.py people` or `videos`.
        split: one of `SPLITS`.
    """
    if split not in SPLITS:
        raise ValueError(f"split {split!r}: expected one of {', '.join(SPLITS)}")
    paths = tuple(sorted(pathlib.Path(folder).glob(f"{split}-*.array_record")))
    if not paths:
        raise ValueError(
            f"no shard {split}-*.array_record in {str(folder)!r}; make the data with "
            f"`python launch/prepare_data.py people --out {folder}`"
        )
    return ClipSource(paths)


def read_manifest(folder: str | pathlib.Path) -> dict:
    """Counts, seed, unit names and hash of a data folder."""
    path = pathlib.Path(folder) / MANIFEST
    if not path.exists():
        raise ValueError(
            f"{str(path)!r} does not exist; expected a folder made with "
            f"`python launch/prepare_data.py people --out {folder}`"
        )
    return json.loads(path.read_text())


def start_manifest(folder: str | pathlib.Path, content: Mapping[str, Any]) -> None:
    """Creates a data folder, or checks that what lies there was begun with the same settings.

    Args:
        folder: to write clips to.
        content: of the manifest while the set is not complete; its `config` is compared.

    Raises:
        ValueError: the folder holds data made with other settings.
    """
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / MANIFEST).exists():
        write_manifest(folder, {**content, "complete": False, "data_hash": None})
        return
    found = read_manifest(folder)["config"]
    wanted = json.loads(json.dumps(content["config"]))
    differing = [k for k in wanted if found.get(k) != wanted[k]]
    if differing:
        raise ValueError(
            f"{str(folder)!r} holds data made with other settings: "
            + ", ".join(f"{k} {found.get(k)} there, {wanted[k]} asked for" for k in differing)
            + "; pass the same settings to go on, or another --out"
        )


def finish_manifest(folder: str | pathlib.Path, content: Mapping[str, Any]) -> str:
    """Marks a data folder complete and records the hash of all its shards; returns the hash."""
    folder = pathlib.Path(folder)
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.array_record")):
        digest.update(bytes.fromhex(file_sha256(path)))
    data_hash = digest.hexdigest()
    write_manifest(folder, {**content, "complete": True, "data_hash": data_hash})
    return data_hash


def write_manifest(folder: pathlib.Path, content: Mapping[str, Any]) -> None:
    """Replaces the manifest at once."""
    part = folder / f"{MANIFEST}.part"
    part.write_text(json.dumps(content, indent=1) + "\n")
    part.rename(folder / MANIFEST)

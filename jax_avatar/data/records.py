"""Clips of talking people on disk: ArrayRecord shards of uncompressed NumPy archives.

```
<split>-00003-of-00040.array_record     one shard, written whole or not at all
manifest.json                           counts, seed, names of the face units, hash of the data
```
"""

import dataclasses
import io
import itertools
import json
import pathlib
from collections.abc import Iterable

import numpy as np

MANIFEST = "manifest.json"
SPLITS = ("train", "held_out_person", "held_out_voice", "held_out_both", "cartoon")

_ARRAYS = ("frames", "portrait", "wave", "units", "lip_gap", "mouth_box", "pose")
_PIXELS = ("frames",)


@dataclasses.dataclass(frozen=True, eq=False)
class ClipRecord:
    """One clip: what is seen, what is heard, and the truth both were made from."""

    frames: np.ndarray  # [T H W 3] uint8; frame i shows time i / fps of the wave
    portrait: np.ndarray  # [H W 3] uint8, the person before the clip, mouth closed
    wave: np.ndarray  # [samples] int16, 16 kHz, the clip and 1280 samples after its end
    units: np.ndarray  # [T q] float16, face-unit weights in the manifest's order
    lip_gap: np.ndarray  # [T] float32, opening of the lips over the height of the head
    mouth_box: np.ndarray  # [T 4] float32: left, top, right, bottom in pixels
    pose: np.ndarray  # [T 8] float32: yaw, pitch, roll, shift right, up, near, gaze right, down
    phones: tuple[tuple[str, float, float], ...]  # name, start and end in seconds of the wave
    actions: tuple[tuple[str, float, float, str], ...]  # name, start, end, caption
    text: str  # the words the clip was cut from
    person_id: int
    voice: str
    split: str
    style: str  # "people" or "cartoon"
    fps: int


def encode_clip(clip: ClipRecord) -> bytes:
    """Packs a clip; decoded by `decode_clip`."""
    arrays = {name: getattr(clip, name) for name in _ARRAYS}
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
        arrays = {name: archive[name] for name in _ARRAYS}
        facts = json.loads(archive["facts"].tobytes())
    for name in _PIXELS:
        for before, frame in itertools.pairwise(arrays[name]):
            frame += before  # some ten times as fast as a cumulative sum over the first axis
    facts["phones"] = tuple(tuple(phone) for phone in facts["phones"])
    facts["actions"] = tuple(tuple(action) for action in facts["actions"])
    return ClipRecord(**arrays, **facts)


def shard_path(folder: str | pathlib.Path, split: str, shard: int, num_shards: int) -> pathlib.Path:
    """Where one shard of a split lies."""
    if split not in SPLITS:
        raise ValueError(f"split {split!r}: expected one of {', '.join(SPLITS)}")
    return pathlib.Path(folder) / f"{split}-{shard:05d}-of-{num_shards:05d}.array_record"


def write_shard(path: pathlib.Path, clips: Iterable[ClipRecord]) -> int:
    """Writes clips to a shard, which appears under its name only once it is whole.

    Returns:
        The number of clips.
    """
    from array_record.python import array_record_module

    part = path.with_suffix(".part")
    writer = array_record_module.ArrayRecordWriter(str(part), "group_size:1,zstd:3")
    count = 0
    for clip in clips:
        writer.write(encode_clip(clip))
        count += 1
    writer.close()
    part.rename(path)
    return count


class ClipSource:
    """Random access to the clips of a split: `len(source)`, `source[i]`; fits `grain`.

    Opened anew in every process it is sent to.
    """

    def __init__(self, paths: tuple[pathlib.Path, ...]):
        self.paths = paths
        self._records = None

    def _open(self):
        if self._records is None:
            from array_record.python import array_record_data_source

            self._records = array_record_data_source.ArrayRecordDataSource(
                [str(path) for path in self.paths]
            )
        return self._records

    def __len__(self) -> int:
        return len(self._open())

    def __getitem__(self, index: int) -> ClipRecord:
        return decode_clip(self._open()[int(index)])

    def __getstate__(self) -> dict:
        return {"paths": self.paths, "_records": None}

    def __repr__(self) -> str:
        return f"ClipSource({len(self.paths)} shards)"


def read_clips(folder: str | pathlib.Path, split: str = "train") -> ClipSource:
    """Opens the clips of one split, also while more shards are being written.

    Args:
        folder: written by `launch/prepare_data.py people`.
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

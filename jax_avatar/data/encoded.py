"""Clips as the transformer trains on them: one record per clip, and an index of them all.

```
index.json                                  fields, grid, fps, hashes, shards; written last
<split>-00003-of-00040.array_record         shards of records
negative_prompt.safetensors                 its text rows, where there is a prompt encoder

record: | length of the header, 4 bytes | header, JSON | raw buffers, little-endian |
```

Latent 0 stands for frame 0, latent l >= 1 for frames 4l-3 to 4l. Windows start at latent 1 or
later, where latents are like those of a stream under way.
"""

import dataclasses
import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from jax_avatar.data.shards import RecordSource
from jax_avatar.weights.checksums import file_sha256
from jax_avatar.weights.files import load_json, load_weights, save_json
from jax_avatar.weights.hashes import content_hash

__all__ = [
    "INDEX",
    "NEGATIVE_PROMPT",
    "EncodedClip",
    "decode_encoded",
    "describe",
    "encode_encoded",
    "finish_index",
    "is_complete",
    "negative_rows",
    "open_encoded",
    "read_index",
    "start_index",
]

INDEX = "index.json"
NEGATIVE_PROMPT = "negative_prompt"
FORMAT = 1
_SMALL = 2**31  # bytes of a split up to which every record is checked before training

# How an array is stored, and the axes that the index tells; upper case counts video frames.
_FIELDS = {
    "latent": ("bfloat16", "t h w c"),
    "reference": ("bfloat16", "r h w c"),
    "wave": ("int16", "n"),
    "text": ("bfloat16", "p f"),
    "features": ("bfloat16", "T k a"),
    "mouth": ("bool", "t h w"),
    "lip_gap": ("float32", "T"),
}
_OPTIONAL = ("text", "features", "mouth", "lip_gap")
_RAW = {"bfloat16": "<u2", "int16": "<i2", "bool": "|u1", "float32": "<f4"}
_TYPES = {"bfloat16": ml_dtypes.bfloat16, "int16": np.int16, "bool": bool, "float32": np.float32}


@dataclasses.dataclass(frozen=True, eq=False)
class EncodedClip:
    """One encoded clip: latents of all frames, audio, text, and ground truth where known."""

    latent: np.ndarray  # [t h w c] bfloat16, latent 0 and one per four further frames
    reference: np.ndarray  # [r h w c] bfloat16, one to four candidate portraits
    wave: np.ndarray  # [n] int16, 16 kHz; the source clip's, from its first frame
    text: np.ndarray | None  # [p f] bfloat16, states of the caption's tokens, without padding
    features: np.ndarray | None  # [T k a] bfloat16, speech features of frames 0 to 4(t-1)
    mouth: np.ndarray | None  # [t h w] bool, cells that the mouth touches
    lip_gap: np.ndarray | None  # [T] float32, opening of the lips over the height of the head
    reference_frames: tuple[int, ...]  # frame of each candidate; -1 is none of this clip
    first_frame: int  # frame of the source clip that is frame 0 here
    caption: str
    actions: tuple[tuple[str, float, float, str], ...]  # name, start, end, caption; from the wave
    fps: int
    person: int
    source: str  # where the clip comes from

    def __post_init__(self):
        frames = 4 * (len(self.latent) - 1) + 1
        for name in ("features", "lip_gap"):
            value = getattr(self, name)
            if value is not None and len(value) != frames:
                raise ValueError(
                    f"clip {self.source}: {name} of {len(value)} video frames came for "
                    f"{len(self.latent)} latents, expected {frames}; encode the clip again."
                )
        samples = (self.first_frame + frames - 1) * 16_000 // self.fps
        if len(self.wave) <= samples:
            raise ValueError(
                f"clip {self.source}: {len(self.wave)} samples of sound came for {frames} frames "
                f"at {self.fps} fps, expected more than {samples}; encode a clip with sound."
            )
        for name in ("latent", "reference", "text", "features", "lip_gap"):
            value = getattr(self, name)
            if value is not None and not np.isfinite(value.astype(np.float32)).all():
                raise ValueError(
                    f"clip {self.source}: {name} holds values that are not numbers; encode it "
                    "again, and look at the weights that encoded it."
                )


def encode_encoded(clip: EncodedClip) -> bytes:
    """Packs a clip; unpacked by `decode_encoded`."""
    arrays, buffers, offset = {}, [], 0
    for name, (kind, _) in _FIELDS.items():
        value = getattr(clip, name)
        if value is None:
            continue
        value = np.ascontiguousarray(value, _TYPES[kind])
        data = value.view(_RAW[kind]).tobytes()
        arrays[name] = {"dtype": kind, "shape": value.shape, "offset": offset}
        buffers.append(data)
        offset += len(data)
    facts = {
        field.name: getattr(clip, field.name)
        for field in dataclasses.fields(clip)
        if field.name not in _FIELDS
    }
    header = json.dumps({"facts": facts, "arrays": arrays}).encode()
    return b"".join([len(header).to_bytes(4, "little"), header, *buffers])


def decode_encoded(data: bytes) -> EncodedClip:
    """Unpacks what `encode_encoded` made; the arrays are read-only."""
    start = 4 + int.from_bytes(data[:4], "little")
    header = json.loads(data[4:start])
    arrays = dict.fromkeys(_FIELDS)
    for name, entry in header["arrays"].items():
        raw = np.frombuffer(
            data, _RAW[entry["dtype"]], math.prod(entry["shape"]), start + entry["offset"]
        )
        arrays[name] = raw.view(_TYPES[entry["dtype"]]).reshape(entry["shape"])
    facts = header["facts"]
    facts["reference_frames"] = tuple(facts["reference_frames"])
    facts["actions"] = tuple(tuple(action) for action in facts["actions"])
    return EncodedClip(**arrays, **facts)


def describe(clips: Iterable[EncodedClip], name: str = "memory") -> dict[str, Any]:
    """Index entries of some clips: latents and person of each, and the shared fields.

    Raises:
        ValueError: they do not share fields, grid, channels, frames per second and so on.
    """
    latents, people, kinds = [], [], set()
    for clip in clips:
        latents.append(len(clip.latent))
        people.append(clip.person)
        kinds.add(json.dumps(_kind(clip)))
    if len(kinds) != 1:
        raise ValueError(
            f"{name} holds clips of {len(kinds)} kinds ({'; '.join(sorted(kinds))}); all must have "
            "the same fields, grid, channels and fps."
        )
    return {"latents": latents, "people": people, "kind": json.loads(kinds.pop())}


def start_index(folder: str | Path, settings: Mapping[str, Any]) -> None:
    """Creates the folder, or checks that what lies there was begun with the same settings."""
    path = Path(folder) / INDEX
    if not path.exists():
        save_json(path, {"format": FORMAT, "complete": False, "settings": dict(settings)})
        return
    found, wanted = load_json(path)["settings"], json.loads(json.dumps(settings))
    odd = [key for key in sorted(found | wanted) if found.get(key) != wanted.get(key)]
    if odd:
        raise ValueError(
            f"{str(folder)!r} holds data encoded with other settings: "
            + ", ".join(f"{key} {found.get(key)} there, {wanted.get(key)} now" for key in odd)
            + "; pass the same settings to go on, or another folder."
        )


def finish_index(folder: str | Path, shards: Mapping[str, list[Path]]) -> dict[str, Any]:
    """Writes the whole index; a folder without one is refused by training.

    Args:
        folder: begun with `start_index`.
        shards: of every split, in order.

    Returns:
        The index.
    """
    folder = Path(folder)
    begun = load_json(folder / INDEX)
    splits = {split: [_entry(path) for path in paths] for split, paths in shards.items()}
    kinds = [entry.pop("kind") for entries in splits.values() for entry in entries]
    if not kinds or any(kind != kinds[0] for kind in kinds):
        raise ValueError(
            f"the shards in {folder} hold clips of different kinds, or none ({kinds}); encode "
            "clips of one size and frame rate."
        )
    index = {**begun, "complete": True, **kinds[0], "splits": splits}
    has_negative = negative_rows(folder) is not None
    index["negative_prompt"] = content_hash(folder, NEGATIVE_PROMPT) if has_negative else None
    index["hash"] = _hash(index)
    save_json(folder / INDEX, index)
    return index


def is_complete(folder: str | Path) -> bool:
    """True if the encoding into a folder is complete."""
    path = Path(folder) / INDEX
    return path.exists() and bool(load_json(path).get("complete"))


def read_index(folder: str | Path) -> dict[str, Any]:
    """The index of a whole data set.

    Raises:
        ValueError: there is none, it is unfinished, of another format, or was changed by hand.
    """
    folder = Path(folder)
    again = f"`python launch/prepare_data.py encode --out {folder}`"
    if not (folder / INDEX).exists():
        raise ValueError(f"{str(folder)!r} has no {INDEX}; encode clips into it with {again}.")
    index = load_json(folder / INDEX)
    if index.get("format") != FORMAT:
        raise ValueError(
            f"{folder / INDEX} has format {index.get('format')}, expected {FORMAT}; encode the "
            f"clips again with {again}."
        )
    if not index["complete"]:
        raise ValueError(f"encoding into {str(folder)!r} was not finished; repeat {again}.")
    if index["hash"] != _hash(index):
        raise ValueError(
            f"{folder / INDEX} was changed since it was written: its hash is "
            f"{index['hash'][:16]}, expected {_hash(index)[:16]}; restore it or encode again."
        )
    return index


def open_encoded(folder: str | Path, split: str) -> tuple[RecordSource, dict[str, Any]]:
    """Opens a split and checks it: every shard's size, and small sets record by record.

    Returns:
        The records, and the index.

    Raises:
        ValueError: shards are missing, cut off or changed, records are broken, or as in
            `read_index`.
    """
    folder, index = Path(folder), read_index(folder)
    shards = index["splits"].get(split, [])
    if not shards:
        raise ValueError(
            f"{str(folder)!r} has no clips of split {split!r}; it has "
            f"{', '.join(index['splits']) or 'none'}."
        )
    is_small = sum(shard["bytes"] for shard in shards) <= _SMALL
    for shard in shards:
        _check_shard(folder / shard["name"], shard, is_small)
    source = RecordSource([folder / shard["name"] for shard in shards], decode_encoded)
    for i in range(len(source)) if is_small else (0,):
        source[i]  # checks itself
    return source, index


def negative_rows(folder: str | Path) -> np.ndarray | None:
    """Text rows `[p f]` of the negative prompt, None where there is none."""
    if not (Path(folder) / f"{NEGATIVE_PROMPT}.safetensors").exists():
        return None
    return np.asarray(load_weights(folder, NEGATIVE_PROMPT)[0]["states"])


def _check_shard(path: Path, entry: Mapping[str, Any], with_hash: bool) -> None:
    have = path.stat().st_size if path.exists() else None
    if have != entry["bytes"]:
        found = "is missing" if have is None else f"has {have:,} bytes"
        raise ValueError(
            f"shard {path} {found}, expected {entry['bytes']:,}; copy it again, or remove it and "
            "repeat the encoding."
        )
    if with_hash and (found := file_sha256(path)) != entry["sha256"]:
        raise ValueError(
            f"shard {path} has hash {found[:16]}, expected {entry['sha256'][:16]}: it was changed "
            "or damaged; copy it again, or remove it and repeat the encoding."
        )


def _entry(path: Path) -> dict[str, Any]:
    clips = RecordSource([path], decode_encoded)
    entry = {"name": path.name, "bytes": path.stat().st_size, "sha256": file_sha256(path)}
    return entry | describe((clips[i] for i in range(len(clips))), path.name)


def _kind(clip: EncodedClip) -> dict[str, Any]:
    """Fields that all clips of a data set share."""
    fields = {
        name: {"dtype": kind, "shape": axes}
        for name, (kind, axes) in _FIELDS.items()
        if getattr(clip, name) is not None
    }
    _, *grid, channels = clip.latent.shape
    states = None if clip.features is None else list(clip.features.shape[1:])
    width = 0 if clip.text is None else clip.text.shape[1]
    return {
        "fields": fields, "grid": grid, "channels": channels, "fps": clip.fps, "states": states,
        "text_width": width,
    }  # fmt: skip


def _hash(index: Mapping[str, Any]) -> str:
    content = {key: value for key, value in index.items() if key != "hash"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

"""Statistics of a prepared data set: clips kept and rejected, picture, sound.

manifest.json, shards, rejected.jsonl --+
index.json, shards ---------------------+--> counts, quantiles of a sample --> table, JSON
"""

import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jax_avatar.data.encoded import INDEX, EncodedClip, decode_encoded, read_index
from jax_avatar.data.records import MANIFEST, SPLITS, ClipRecord, ClipSource, read_manifest
from jax_avatar.data.shards import RecordSource

__all__ = ["FILE", "data_statistics", "statistics_table"]

FILE = "statistics.json"
_NOTES = "done"  # folder of what became of each video
_SAMPLE_RATE = 16_000
_LOOKS = 3  # frames of a clip that faces are looked for in
_QUANTILES = {"least": 0, "p5": 5, "median": 50, "p95": 95, "most": 100}


def data_statistics(folder: str | Path, *, sample: int = 2000) -> dict[str, Any]:
    """Figures about a folder of raw or encoded clips, as plain values.

    Args:
        folder: written by `launch/prepare_data.py people`, `videos` or `encode`.
        sample: clips that are opened, evenly spread; the others are only counted.

    Returns:
        `kind`, `complete`, `clips`, `opened`, `splits` (clips of each), `counts` (how many of the
        opened clips have which size, rate, voice, language ..), `quantiles` (of durations in s,
        RMS level in dBFS, share of speech, height of faces as a share of the picture's ..),
        `rejected` (parts by reason, numbers left out) and `missing` (what was not measured, with
        the cause).

    Raises:
        ValueError: there are no clips.
    """
    folder = Path(folder)
    if sample < 1:
        raise ValueError(f"sample {sample}: expected 1 clip or more.")
    if (folder / INDEX).exists():
        about, splits = _encoded(folder)
    elif (folder / MANIFEST).exists():
        about, splits = _raw(folder)
    else:
        raise ValueError(
            f"{str(folder)!r} has neither {MANIFEST} nor {INDEX}; give a folder that "
            "`launch/prepare_data.py people`, `videos` or `encode` has written."
        )
    total = sum(len(source) for source in splits.values())
    if not total:
        raise ValueError(f"{str(folder)!r} has no clips yet.")
    missing: dict[str, str] = {}
    judges = _judges(missing) if about["kind"] == "raw" else _judges(missing, faces=False)
    facts = [_facts(clip, judges) for clip in _spread(splits.values(), total, sample)]
    known = _videos(folder) if about["kind"] == "raw" else {}
    if not known.get("languages"):
        missing["languages"] = "no source names one"
    return {
        "folder": str(folder),
        **about,
        "clips": total,
        "opened": len(facts),
        "splits": {split: len(source) for split, source in splits.items()},
        "counts": _counts(facts),
        "quantiles": _quantiles(facts),
        **known,
        "missing": missing,
    }


def statistics_table(found: Mapping[str, Any]) -> str:
    """The figures for a terminal."""
    state = "complete" if found["complete"] else "not finished"
    lines = [
        f"{found['folder']}: {found['clips']:,} clips, {found['kind']}, {state}; "
        f"{found['opened']:,} opened",
        "",
        f"{'':24}" + "".join(f"{name:>10}" for name in (*_QUANTILES, "mean")),
    ]
    for name, row in found["quantiles"].items():
        lines.append(f"{name:24}" + "".join(f"{value:10.3g}" for value in row.values()))
    lines.append("")
    counts = {"split": found["splits"], **found["counts"]}
    counts |= {"language": found["languages"]} if found.get("languages") else {}
    for name, row in counts.items():
        shown = ", ".join(f"{value} {count:,}" for value, count in list(row.items())[:12])
        lines.append(f"{name:24}{shown}{', ..' if len(row) > 12 else ''}")
    if "rejected" in found:
        rejected = found["rejected"]
        lines += ["", f"rejected: {rejected['parts']:,} parts of {found['videos']:,} videos"]
        lines += [f"  {count:8,}  {reason}" for reason, count in rejected["reasons"].items()]
    lines += [f"not measured: {name} ({cause})" for name, cause in found["missing"].items()]
    return "\n".join(lines)


def _raw(folder: Path) -> tuple[dict[str, Any], dict[str, RecordSource]]:
    paths = {split: tuple(sorted(folder.glob(f"{split}-*.array_record"))) for split in SPLITS}
    about = {"kind": "raw", "complete": bool(read_manifest(folder).get("complete"))}
    return about, {split: ClipSource(found) for split, found in paths.items() if found}


def _encoded(folder: Path) -> tuple[dict[str, Any], dict[str, RecordSource]]:
    index = read_index(folder)
    splits = {
        split: RecordSource([folder / shard["name"] for shard in shards], decode_encoded)
        for split, shards in index["splits"].items()
    }
    return {"kind": "encoded", "complete": True, "hash": index["hash"]}, splits


def _videos(folder: Path) -> dict[str, Any]:
    """Notes of cut videos, also while more are being cut."""
    notes = [json.loads(path.read_text()) for path in sorted((folder / _NOTES).glob("*.json"))]
    if not notes:
        return {}
    entries = [entry for note in notes for entry in note["rejected"]]
    reasons = Counter(_kind_of_reason(entry) for entry in entries)
    seconds = sum(entry.get("end_s", 0) - entry.get("start_s", 0) for entry in entries)
    languages = Counter(note["language"] for note in notes if note.get("language"))
    return {
        "videos": len(notes),
        "kept": {name: sum(note[name] for note in notes) for name in ("clips", "seconds")},
        "rejected": {
            "parts": len(entries),
            "seconds": round(seconds, 3),
            "reasons": dict(reasons.most_common()),
        },
        "languages": dict(languages.most_common()),
    }


def _kind_of_reason(entry: Mapping[str, Any]) -> str:
    """A reason without what is special about one part: its numbers, the name of its file."""
    named = re.sub(rf"\S*{re.escape(entry['video'])}", "the file", entry["reason"])
    return re.sub(r"\d+(\.\d+)?", "#", named)


def _spread(
    sources: Iterable[RecordSource], total: int, sample: int
) -> Iterator[ClipRecord | EncodedClip]:
    chosen = iter(np.unique(np.linspace(0, total - 1, min(sample, total)).astype(int)).tolist())
    wanted, first = next(chosen, None), 0
    for source in sources:
        while wanted is not None and wanted < first + len(source):
            yield source[wanted - first]
            wanted = next(chosen, None)
        first += len(source)


def _judges(missing: dict[str, str], *, faces: bool = True) -> dict[str, Any]:
    """Measures that need packages which not everybody has."""
    judges = {}
    try:
        import webrtcvad  # noqa: F401

        from jax_avatar.data.videos.filters import speech_share

        judges["speech"] = speech_share
    except ImportError as error:
        missing["speech_share"] = f'{error}; pip install "jax_avatar[videos]"'
    if not faces:
        missing["faces"] = "encoded clips have no pictures"
        return judges
    try:
        from jax_avatar.data.videos.faces import FrontalFaces

        judges["faces"] = FrontalFaces(smallest=0.1)
    except ImportError as error:
        missing["faces"] = f'{error}; pip install "jax_avatar[videos]"'
    return judges


def _facts(clip: ClipRecord | EncodedClip, judges: Mapping[str, Any]) -> dict[str, Any]:
    """Numbers are put into quantiles, texts are counted."""
    is_raw = isinstance(clip, ClipRecord)
    frames = len(clip.frames) if is_raw else 4 * (len(clip.latent) - 1) + 1
    first = 0 if is_raw else clip.first_frame * _SAMPLE_RATE // clip.fps
    wave = clip.wave[first : first + frames * _SAMPLE_RATE // clip.fps]
    level = np.sqrt(np.mean(np.square(wave.astype(np.float64)))) / 32768 if len(wave) else 0.0
    facts = {
        "duration_s": frames / clip.fps,
        "level_dbfs": 20 * math.log10(max(level, 1e-6)),
        "fps": f"{clip.fps}",
        "caption": "yes" if clip.caption else "no",
        "person": f"{clip.person_id if is_raw else clip.person}",
    }
    if "speech" in judges:
        facts["speech_share"] = judges["speech"](wave)
    if not is_raw:
        rows, cols = clip.latent.shape[1:3]
        return facts | {"latents": f"{rows}x{cols}"}
    facts |= {"size": "{}x{}".format(*clip.frames.shape[1:3]), "style": clip.style}
    facts |= {"voice": clip.voice} if clip.voice else {}
    if clip.lip_gap is not None:
        facts["lip_gap"] = float(np.mean(clip.lip_gap))
    if "faces" in judges:
        looks = np.linspace(0, frames - 1, _LOOKS).astype(int)
        found = [judges["faces"](clip.frames[look]) for look in looks]
        facts["faces_found"] = float(np.mean([len(boxes) == 1 for boxes in found]))
        heights = [float((boxes[:, 3] - boxes[:, 1]).max()) for boxes in found if len(boxes)]
        facts |= {"face_height": float(np.median(heights))} if heights else {}
    return facts


def _counts(facts: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, int]]:
    columns: dict[str, Counter] = {}
    for row in facts:
        for name, value in row.items():
            if isinstance(value, str):
                columns.setdefault(name, Counter())[value] += 1
    people = columns.pop("person")
    columns["people"] = Counter({"different": len(people), "with most clips": max(people.values())})
    return {name: dict(column.most_common()) for name, column in columns.items()}


def _quantiles(facts: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    columns: dict[str, list[float]] = {}
    for row in facts:
        for name, value in row.items():
            if not isinstance(value, str):
                columns.setdefault(name, []).append(value)
    return {
        name: {
            **{key: round(float(np.percentile(column, q)), 4) for key, q in _QUANTILES.items()},
            "mean": round(float(np.mean(column)), 4),
        }
        for name, column in columns.items()
    }

"""Folder of videos -> raw clips of one talking person, or the reason why not.

video --cuts--> shots --one face--> stretches --length--> pieces --crop--> clips --filters--> shard
                                                     |                      |
                                                     +-> rejected.jsonl <---+

Each video makes a shard of its own, and a note that it is done; what is done stays.
"""

import dataclasses
import functools
import hashlib
import itertools
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from jax_avatar.data import records
from jax_avatar.data.records import ClipRecord
from jax_avatar.data.videos.faces import (
    FaceFinder,
    FrontalFaces,
    Stretch,
    single_face_stretches,
)
from jax_avatar.data.videos.filters import Filter, HasSound, HasSpeech
from jax_avatar.data.videos.footage import SAMPLE_RATE, Footage
from jax_avatar.data.videos.shots import ShotCuts
from jax_avatar.weights.files import load_json, save_json

__all__ = [
    "REJECTED",
    "Piece",
    "VideoConfig",
    "VideoJob",
    "crop_box",
    "cut_stretch",
    "cut_video",
    "find_pieces",
    "finish",
    "plan",
    "start",
]

REJECTED = "rejected.jsonl"
_NOTES = "done"  # folder of the notes
_SUFFIXES = (".avi", ".m4v", ".mkv", ".mov", ".mp4", ".mpg", ".mts", ".webm")
_LOOKAHEAD = 1280  # samples after the end of a clip, for a speech encoder that listens ahead


@dataclass(frozen=True)
class VideoConfig:
    """Selection and shape of the clips cut from videos.

    Attributes:
        size: height and width of the clips in pixels, multiples of 16.
        fps: frames per second, 16 or 25; of the model that will learn from them.
        min_s: shortest clip.
        max_s: longest clip; longer stretches become several of equal length.
        face_share: least height of the face, as a share of the video's picture.
        face_zoom: height of the crop in heights of the face; 0 takes all that fits.
        speech_share: least share of the time with speech.
        looks_per_s: how often faces are looked for.
        latents_step: clips have 1 + 4n frames with n a multiple of this, so that few lengths have
            to be compiled.
        held_out_share: of the videos, kept for tests, all clips of a video together.
    """

    size: tuple[int, int] = (96, 96)
    fps: int = 16
    min_s: float = 2.0
    max_s: float = 20.0
    face_share: float = 0.15
    face_zoom: float = 0.0
    speech_share: float = 0.7
    looks_per_s: float = 4.0
    latents_step: int = 4
    held_out_share: float = 0.05

    def __post_init__(self):
        object.__setattr__(self, "size", tuple(self.size))
        if len(self.size) != 2 or any(side < 16 or side % 16 for side in self.size):
            raise ValueError(f"size {self.size}: expected height and width, multiples of 16.")
        if self.fps not in (16, 25):
            raise ValueError(f"fps {self.fps}: models of this project stream 16 or 25.")
        if not 0 < self.min_s <= self.max_s:
            raise ValueError(f"min_s {self.min_s} and max_s {self.max_s}: the smaller comes first.")
        if self.latents_step < 1 or self.frames_of(self.max_s) < max(5, self.min_s * self.fps):
            raise ValueError(
                f"no clip of 1 + 4n frames, n a multiple of latents_step {self.latents_step}, is "
                f"{self.min_s} to {self.max_s} s long; widen the range."
            )
        shares = self.face_share, self.speech_share, self.held_out_share
        if not all(0 <= share <= 1 for share in shares) or self.looks_per_s <= 0:
            raise ValueError(f"shares {shares} must be within 0..1, and looks_per_s positive.")
        if self.face_zoom < 0:
            raise ValueError(f"face_zoom {self.face_zoom}: expected face heights, 0 for all.")

    def frames_of(self, seconds: float) -> int:
        """Frames of the longest clip that is no longer than this; 1 if there is none."""
        step = 4 * self.latents_step
        return 1 + int((round(seconds * self.fps) - 1) // step) * step


@dataclass(frozen=True)
class VideoJob:
    """One video to cut.

    Attributes:
        config: of the clips.
        folder: with the videos.
        name: of the file in it.
        out: folder of the clips.
        filters: asked after the built-in ones.
    """

    config: VideoConfig
    folder: Path
    name: str
    out: Path
    filters: tuple[Filter, ...] = ()

    @functools.cached_property
    def id(self) -> str:
        """Hash of the video's name and size."""
        size = (self.folder / self.name).stat().st_size
        return hashlib.sha256(f"{self.name} {size}".encode()).hexdigest()[:16]

    @property
    def split(self) -> str:
        """Split of its clips."""
        draw = int(self.id[:8], 16) / 2**32
        return "held_out_person" if draw < self.config.held_out_share else "train"

    @property
    def shard(self) -> Path:
        """File of its clips."""
        return self.out / f"{self.split}-{self.id}.array_record"

    @property
    def note(self) -> Path:
        """Path of the result, written last."""
        return self.out / _NOTES / f"{self.id}.json"


def start(config: VideoConfig, out: str | Path, filters: Sequence[str] = ()) -> None:
    """Creates the folder, or checks that what lies there was made with the same settings."""
    records.start_manifest(out, _manifest(config, filters))
    (Path(out) / _NOTES).mkdir(exist_ok=True)


def plan(
    config: VideoConfig, folder: str | Path, out: str | Path, filters: Sequence[Filter] = ()
) -> list[VideoJob]:
    """One job per video of a folder and the folders in it.

    Raises:
        ValueError: there is none.
    """
    folder, out = Path(folder), Path(out)
    names = sorted(
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*")
        if path.suffix.lower() in _SUFFIXES
    )
    if not names:
        raise ValueError(
            f"{str(folder)!r} has no videos; expected files that end in {', '.join(_SUFFIXES)}."
        )
    return [VideoJob(config, folder, name, out, tuple(filters)) for name in names]


def cut_video(job: VideoJob, find_faces: FaceFinder | None = None) -> dict[str, Any]:
    """Makes the clips of one video, unless that was done.

    Args:
        job: the video.
        find_faces: finds faces in a frame; OpenCV's cascade if not given.

    Returns:
        What became of it: `clips`, `seconds`, and `rejected`, a list.
    """
    if job.note.exists():
        return load_json(job.note)
    find_faces = find_faces or FrontalFaces(smallest=0.6 * job.config.face_share)
    rejected: list[dict[str, Any]] = []
    frames: list[int] = []
    language = ""
    try:
        language = _footage(job).language
        clips = _kept(job, find_faces, frames, rejected)
        # One clip at a time: those of a long video would not fit into memory together.
        if first := next(clips, None):
            records.write_shard(job.shard, itertools.chain([first], clips))
    except ValueError as error:
        # All of it: half a video would make a set that depends on where reading failed.
        frames, rejected = [], [{"video": job.name, "reason": str(error)}]
    seconds = round(sum(frames) / job.config.fps, 3)
    note = {"video": job.name, "clips": len(frames), "seconds": seconds, "rejected": rejected}
    note |= {"language": language} if language else {}
    save_json(job.note, note)
    return note


def finish(config: VideoConfig, out: str | Path, filters: Sequence[str] = ()) -> str:
    """Gathers the rejections in one file and marks the set complete; returns its hash."""
    out = Path(out)
    notes = [load_json(path) for path in sorted((out / _NOTES).glob("*.json"))]
    notes.sort(key=lambda note: note["video"])
    lines = [json.dumps(entry) + "\n" for note in notes for entry in note["rejected"]]
    part = out / f"{REJECTED}.part"
    part.write_text("".join(lines))
    part.rename(out / REJECTED)
    counts = {name: sum(note[name] for note in notes) for name in ("clips", "seconds")}
    about = {"videos": len(notes), "rejected": len(lines), **counts}
    return records.finish_manifest(out, {**_manifest(config, filters), **about})


@dataclass
class Piece:
    """Part of a video.

    Attributes:
        start, stop: frames; `stop` is not in it.
        box: around the face at all times, left, top, right, bottom in shares of the picture.
        reason: why it is no clip; None if it is one.
    """

    start: int
    stop: int
    box: np.ndarray | None = None
    reason: str | None = None

    def rejection(self, job: VideoJob) -> dict[str, Any]:
        """Line of the file of rejections."""
        times = {"start_s": self.start / job.config.fps, "end_s": self.stop / job.config.fps}
        return {"video": job.name, **times, "reason": self.reason}


def _kept(job, find_faces, frames, rejected) -> Iterator[ClipRecord]:
    """The clips to keep; notes their lengths, and what is rejected."""
    for piece in find_pieces(job, find_faces):
        if piece.reason is None:
            clip = _clip(job, piece)
            piece.reason = _reason(job, clip)
        if piece.reason is None:
            frames.append(len(clip.frames))
            yield clip
        else:
            rejected.append(piece.rejection(job))


def find_pieces(job: VideoJob, find_faces: FaceFinder) -> Iterator[Piece]:
    """Parts of a video in order, with the reason where one is no clip for sure."""
    config, footage = job.config, _footage(job)
    if not footage.has_sound:
        raise ValueError("no sound")
    cuts, looks, step = ShotCuts(), [], max(1, round(config.fps / config.looks_per_s))
    for number, frame in enumerate(footage.frames()):
        cuts.watch(frame)
        if number % step == 0:
            looks.append((number, find_faces(frame)))
    for start, stop in cuts.shots():
        at = start
        for stretch in single_face_stretches(looks, start, stop):
            if stretch.start > at:
                yield Piece(at, stretch.start, reason="not exactly one face")
            yield from cut_stretch(config, stretch)
            at = stretch.stop
        if at < stop:
            yield Piece(at, stop, reason="not exactly one face")


def cut_stretch(config: VideoConfig, stretch: Stretch) -> Iterator[Piece]:
    """Pieces of equal length of a stretch, or one that is too short."""
    length = stretch.stop - stretch.start
    count = max(1, math.ceil(length / (config.max_s * config.fps)))
    frames = config.frames_of(length // count / config.fps)
    if frames < max(5, config.min_s * config.fps):
        yield Piece(stretch.start, stretch.stop, reason=f"shorter than {config.min_s} s")
        return
    # Of the whole stretch, so that every piece of it is cropped alike.
    box = np.r_[stretch.boxes[:, :2].min(0), stretch.boxes[:, 2:].max(0)]
    height = float(np.median(stretch.boxes[:, 3] - stretch.boxes[:, 1]))
    for i in range(count):
        first = stretch.start + i * (length // count)
        piece = Piece(first, first + frames, box)
        if height < config.face_share:
            piece.reason = f"face of {height:.0%} of the picture's height"
        yield piece


def _clip(job: VideoJob, piece: Piece) -> ClipRecord:
    config, frames = job.config, []
    for frame in _footage(job).frames(piece.start, piece.stop):
        top, bottom, left, right = crop_box(frame.shape[:2], piece.box, config)
        part = np.ascontiguousarray(frame[top:bottom, left:right])
        shrinks = bottom - top > config.size[0]
        how = cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR
        frames.append(cv2.resize(part, config.size[::-1], interpolation=how))
    first, last = (at * SAMPLE_RATE // config.fps for at in (piece.start, piece.stop))
    caption = (job.folder / job.name).with_suffix(".txt")
    return ClipRecord(
        frames=np.stack(frames),
        wave=_sound(job)[first : last + _LOOKAHEAD],
        fps=config.fps,
        split=job.split,
        style="video",
        person_id=int(job.id[:7], 16),
        source=f"{job.name}@{piece.start / config.fps:.2f}s",
        caption=caption.read_text().strip() if caption.exists() else "",
    )


def _reason(job: VideoJob, clip: ClipRecord) -> str | None:
    filters = (HasSound(), HasSpeech(job.config.speech_share), *job.filters)
    return next((reason for judge in filters if (reason := judge(clip))), None)


def crop_box(
    picture: tuple[int, int], box: np.ndarray, config: VideoConfig
) -> tuple[int, int, int, int]:
    """Top, bottom, left, right in pixels: of the wanted shape, around the face, in the picture."""
    height, width = picture
    aspect = config.size[1] / config.size[0]
    left, top, right, bottom = box * np.array([width, height, width, height])
    rows = min(height, width / aspect)
    if config.face_zoom:
        # The box holds the face at all times, so a moving one is shown a little smaller.
        rows = min(rows, max(config.face_zoom * (bottom - top), (right - left) / aspect))
    rows, cols = int(rows), int(rows * aspect)
    y = int(np.clip((top + bottom) / 2 - rows / 2, 0, height - rows))
    x = int(np.clip((left + right) / 2 - cols / 2, 0, width - cols))
    return y, y + rows, x, x + cols


def _footage(job: VideoJob) -> Footage:
    return Footage(job.folder / job.name, job.config.fps)


@functools.lru_cache(maxsize=1)
def _sound(job: VideoJob) -> np.ndarray:
    return _footage(job).sound()


def _manifest(config: VideoConfig, filters: Sequence[str]) -> dict[str, Any]:
    return {"config": dataclasses.asdict(config) | {"filters": list(filters)}}

"""Evaluation of makers of clips: held-out clips made, scored, kept as pictures and videos.

clips --Maker--> frames --> scores with intervals, a contact sheet, videos

A maker is called with portraits, waves and a number of frames; a `BatchStream` is one.
"""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image

from jax_avatar.data.records import ClipRecord, read_clips
from jax_avatar.evaluation.mouth_probe import MouthProbe
from jax_avatar.evaluation.scores import (
    Truth,
    contact_sheet,
    fit_probe,
    measure,
    reconstruct,
    score_stream,
    still_portraits,
)
from jax_avatar.evaluation.tables import scored
from jax_avatar.io.video import VideoWriter
from jax_avatar.streaming.batch import BatchStream
from jax_avatar.streaming.plan import StreamPlan
from jax_avatar.weights.folder import AvatarModel

__all__ = [
    "KitSettings",
    "ablated_plan",
    "evaluate",
    "make_clips",
    "make_long",
    "makers_of",
    "write_clips",
]

Frames = UInt8[np.ndarray, "b T H W 3"]
Waves = Float[np.ndarray, "b N"]
Maker = Callable[[UInt8[np.ndarray, "b H W 3"], Waves, int], Frames]

_NUM_VIDEOS = 3
_WINDOW_S = 5  # of a long stream, compared with its first


@dataclass(frozen=True)
class KitSettings:
    """Settings of an evaluation.

    Attributes:
        clips: per split, at most.
        batch: portraits made side by side.
        long_s: seconds of the long stream; 0 for none.
        seed: of the bootstrap's draws.
        with_still: score the portrait standing still, too.
    """

    clips: int = 24
    batch: int = 8
    long_s: int = 60
    seed: int = 420
    with_still: bool = False


def ablated_plan(model: AvatarModel, seed: int, *, aas: bool, rolling_rope: bool) -> StreamPlan:
    """The model's plan, without the adaptive attention sink or Rolling RoPE.

    Args:
        model: to stream.
        seed: of the noise.
        aas: renew the sink, as the model says.
        rolling_rope: let the sink move along with the stream.
    """
    plan = StreamPlan.from_settings(model.settings, seed)
    if not aas:
        plan = dataclasses.replace(plan, aas_after_blocks=0)
    if not rolling_rope:  # so far behind that the sink stays where it is in the beginning
        size = model.dit.config.frames_per_block
        plan = dataclasses.replace(plan, distance=lambda block, step: -size * block)
    return plan


def makers_of(
    model: AvatarModel, plan: StreamPlan, *, sample: Callable | None = None, one_step: bool = False
) -> dict[str, BatchStream]:
    """Makers of clips, by the name of their row: "generated", and "one_step" for levels (1, 0).

    Args:
        model: to stream.
        plan: how.
        sample: makes whole clips instead, see `BatchStream`.
        one_step: also stream in one step.
    """
    makers = {"generated": BatchStream(model, plan, sample=sample)}
    if one_step:
        makers["one_step"] = BatchStream(model, dataclasses.replace(plan, sigmas=(1.0, 0.0)))
    return makers


def evaluate(
    model: AvatarModel,
    data: str | Path,
    splits: Sequence[str],
    makers: Mapping[str, Maker],
    settings: KitSettings,
    out: Path,
    *,
    progress: Callable[[Iterable], Iterable] = iter,
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Scores makers on every split, and those that stream on a long stream.

    Args:
        model: whose VAE and rates are used.
        data: folder of raw clips; the probe of the mouth is fitted on its training split.
        splits: of the data.
        makers: by the name of their row; "generated" is written as pictures and videos.
        settings: of the evaluation.
        out: folder for those.
        progress: wraps the batches of a split.

    Yields:
        A split, or "long", and its scores: `n` clips and a row for each maker.
    """
    train, clips = read_clips(data, "train"), []
    probe = fit_probe([train[i] for i in range(0, len(train), max(1, len(train) // 200))])
    for split in splits:
        source = read_clips(data, split)
        clips = [source[i] for i in range(min(settings.clips, len(source)))]
        made = {
            name: make_clips(maker, clips, settings.batch, progress)
            for name, maker in makers.items()
        }
        yield split, _score_split(model, clips, made, probe, settings, out / split)
    if settings.long_s and clips:
        scores = {"n": settings.batch, "seconds": settings.long_s}
        for name, maker in makers.items():
            frames, waves, found = make_long(maker, model, clips, settings)
            if name == "generated":
                scores |= found
                rate = model.speech.config.sample_rate
                _write_video(out / "long.mp4", frames[0], waves[0], model.settings.fps, rate)
            else:
                scores[name] = found
        yield "long", scores


def make_clips(
    maker: Maker,
    clips: Sequence[ClipRecord],
    batch: int,
    progress: Callable[[Iterable], Iterable] = iter,
) -> Frames:
    """Makes clips of the portraits and waves of others, so many side by side.

    The last batch is filled up with the first clips, since another size would compile again.
    """
    frames, parts = len(clips[0].frames), []
    for start in progress(range(0, len(clips), batch)):
        part = [clips[i % len(clips)] for i in range(start, start + batch)]
        waves = np.stack([clip.wave for clip in part]).astype(np.float32) / 32768
        parts.append(maker(np.stack([clip.portrait for clip in part]), waves, frames))
    return np.concatenate(parts)[: len(clips)]


def make_long(
    maker: Maker, model: AvatarModel, clips: Sequence[ClipRecord], settings: KitSettings
) -> tuple[Frames, Waves, dict[str, Any]]:
    """A few portraits that say everything in `clips` one after another: frames, waves, scores."""
    count, fps = settings.batch, model.settings.fps
    said = np.concatenate([clip.wave for clip in clips]).astype(np.float32) / 32768
    samples = settings.long_s * model.speech.config.sample_rate
    waves = np.stack(
        [np.resize(np.roll(said, -i * len(said) // count), samples) for i in range(count)]
    )
    portraits = np.stack([clips[i % len(clips)].portrait for i in range(count)])
    frames = maker(portraits, waves, settings.long_s * fps)
    found = score_stream(frames, portraits, window=_WINDOW_S * fps, seed=settings.seed)
    return frames, waves, found


def write_clips(
    paths: Sequence[Path],
    beside: np.ndarray,
    frames: Frames,
    waves: Iterable[np.ndarray],
    *,
    fps: int,
    sample_rate: int,
) -> None:
    """Writes the first clips as videos with sound, something else on their left.

    Args:
        paths: .mp4, as many as are wanted.
        beside: `[b H W 3]` portraits or `[b T H W 3]` videos, uint8.
        frames: of the clips.
        waves: mono in [-1, 1].
        fps: frames per second.
        sample_rate: of the waves.
    """
    for path, left, made, wave in zip(paths, beside, frames, waves, strict=False):
        both = np.concatenate([np.broadcast_to(left, made.shape), made], axis=2)
        _write_video(path, both, wave, fps, sample_rate)


def _score_split(
    model: AvatarModel,
    clips: Sequence[ClipRecord],
    made: dict[str, Frames],
    probe: MouthProbe | None,
    settings: KitSettings,
    out: Path,
) -> dict[str, Any]:
    truth = Truth.from_clips(clips)
    if settings.with_still:
        made["still"] = still_portraits(truth)
    made["decoded_truth"] = reconstruct(model.vae, truth)
    rows = {
        name: scored(measure(frames, truth, probe), seed=settings.seed)
        for name, frames in made.items()
    }
    Image.fromarray(contact_sheet(made["generated"], truth)).save(out.with_suffix(".png"))
    write_clips(
        [out.with_name(f"{out.name}_{i}.mp4") for i in range(_NUM_VIDEOS)],
        *(truth.frames, made["generated"], [clip.wave / 32768 for clip in clips]),
        fps=model.settings.fps,
        sample_rate=model.speech.config.sample_rate,
    )
    return {"n": len(clips), **rows}


def _write_video(path: Path, frames: np.ndarray, wave: np.ndarray, fps: int, rate: int) -> None:
    height, width = frames.shape[1:3]
    with VideoWriter(path, width, height, fps, rate) as video:
        video.write_audio(np.asarray(wave, np.float32))
        video.write_frames(frames)

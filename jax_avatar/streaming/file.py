"""From an audio source to a video file, block by block, and how fast it went."""

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from jax_avatar.io.video import VideoWriter
from jax_avatar.streaming.session import AvatarSession

__all__ = ["StreamReport", "for_duration", "stream_to_file"]


@dataclass(frozen=True)
class StreamReport:
    """Report of a stream: its length and speed, without compilation.

    Attributes:
        frames: video frames written.
        video_s: their duration.
        wall_s: from the first samples to the last frame.
        fps: frames written per second of wall time.
        time_to_first_frame_s: from the first samples to the first frames.
        real_time_factor: `video_s / wall_s`; at least 1 keeps up with speech.
        block_latency_s: median time from a block's last sample to its frames.
        is_silent: nothing was heard.
        is_complete: the audio was streamed to its end.
    """

    frames: int
    video_s: float
    wall_s: float
    fps: float
    time_to_first_frame_s: float | None
    real_time_factor: float
    block_latency_s: float | None
    is_silent: bool
    is_complete: bool

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def for_duration(
    chunks: Iterable[np.ndarray], num_samples: int | None, chunk: int
) -> Iterator[np.ndarray]:
    """Audio cut to a number of samples, or followed by silence up to it.

    Args:
        chunks: audio.
        num_samples: wanted; None leaves the audio as it is.
        chunk: samples per chunk of silence.
    """
    if num_samples is None:
        yield from chunks
        return
    left = num_samples
    for samples in chunks:
        yield samples[:left]
        left -= len(samples)
        if left <= 0:
            return
    while left > 0:
        yield np.zeros(min(chunk, left), np.float32)
        left -= chunk


def stream_to_file(
    session: AvatarSession,
    chunks: Iterable[np.ndarray],
    writer: VideoWriter,
    on_frames: Callable[[int], None] = lambda count: None,
) -> StreamReport:
    """Streams audio to the end, or to an interrupt, and writes frames as they are made.

    Args:
        session: ready to start.
        chunks: mono audio at the session's rate.
        writer: open; closing it is the caller's.
        on_frames: called with the number of frames just written.

    Returns:
        The report; after Ctrl-C that of what was written, with `is_complete` false.
    """
    written, peak, is_complete = 0, 0.0, False
    began = time.perf_counter()

    def write(frames: Iterable[np.ndarray]) -> None:
        nonlocal written
        for part in frames:
            writer.write_frames(part)
            written += len(part)
            on_frames(len(part))

    try:
        for samples in chunks:
            peak = max(peak, float(np.abs(samples).max(initial=0)))
            writer.write_audio(samples)
            write(session.push(samples))
        write(session.finish())
        is_complete = True
    except KeyboardInterrupt:
        pass
    times, fps = session.times, session.model.settings.fps
    wall = (times.last_frame or time.perf_counter()) - (times.started or began)
    first = None
    if times.first_frame is not None and times.started is not None:
        first = times.first_frame - times.started
    return StreamReport(
        frames=written,
        video_s=written / fps,
        wall_s=wall,
        fps=written / wall if wall > 0 else 0.0,
        time_to_first_frame_s=first,
        real_time_factor=written / fps / wall if wall > 0 else 0.0,
        block_latency_s=float(np.median(times.blocks)) if times.blocks else None,
        is_silent=peak < 1e-4,
        is_complete=is_complete,
    )

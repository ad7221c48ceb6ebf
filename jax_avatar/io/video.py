"""Frames and samples -> a video file that plays even if it is never closed.

frames, samples --> NAME.part-PROCESS.mp4 --close--> NAME.mp4
"""

import contextlib
import itertools
import os
import shutil
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import soxr
from jaxtyping import UInt8

from jax_avatar.io.media import best_stream, media_url, open_media
from jax_avatar.io.mixing import Mixer
from jax_avatar.io.provenance import COMMENT
from jax_avatar.io.watermark import mark
from jax_avatar.shapes import Float

__all__ = ["VideoWriter", "read_video", "samples_by_time"]

_SUFFIXES = {".mp4": "mp4", ".mov": "mov", ".mkv": "matroska"}
# One fragment per key frame, so that what is written is playable. The header waits for the first
# fragment, to say how many samples of AAC priming to skip. Closing makes a plain file of it, except
# with FFmpeg up to 8.0, which would break the file there.
_CLOSES_PLAIN = av.library_versions["libavformat"] >= (62, 12)
_MOV = {
    "movflags": "frag_keyframe+delay_moov+default_base_moof"
    + ("+hybrid_fragmented" if _CLOSES_PLAIN else ""),
    "flush_packets": "1",
}
_JITTER_S = 0.02  # that a time stamp may depart from the end of the sound before it
_MATROSKA = {"cluster_time_limit": "1000", "flush_packets": "1"}


class VideoWriter:
    """H.264 and AAC, written as they come; use as a context manager.

    Video frame 0 and audio sample 0 are both at time 0. The file gets its name when it is closed;
    until then an older one stays, and after that too, under another name, if this one is not whole.

    Attributes:
        path: of the video.
        part: where frames are until it is closed; `path` itself if that is a device.
        older: what an older video is called now that a part took its name; None if there is none.
    """

    def __init__(
        self,
        path: str | Path,
        width: int,
        height: int,
        fps: int,
        audio_rate: int | None = None,
        *,
        show: Callable[[np.ndarray], np.ndarray] = lambda frames: frames,
        is_marked: bool = True,
    ):
        """Checks that the file can be written; the first frame creates it.

        Args:
            path: ends in .mp4, .mov or .mkv; replaced if it exists, but a link stays one.
            width: pixels, even.
            height: pixels, even.
            fps: frames per second.
            audio_rate: samples per second of the sound; None for a silent film.
            show: frames as they come -> frames of the video.
            is_marked: puts the watermark into the frames.

        Raises:
            ValueError: an unknown kind of file, an odd size, a rate that cannot be, or a place
                that cannot be written.
        """
        self.path = Path(path)
        if self.path.suffix.lower() not in _SUFFIXES:
            raise ValueError(f"output {path}: expected a name ending in {', '.join(_SUFFIXES)}.")
        if width % 2 or height % 2 or width < 2 or height < 2:
            raise ValueError(f"video of {width}x{height} pixels; H.264 needs even sides.")
        sound_rates = av.Codec("aac", "w").audio_rates
        if audio_rate is not None and audio_rate not in sound_rates:
            raise ValueError(f"sound of {audio_rate} Hz; AAC takes one of {sorted(sound_rates)}.")
        if fps < 1:
            raise ValueError(f"video of {fps} frames per second; expected at least 1.")
        is_folder = os.path.isdir(self.path)
        if is_folder or not os.path.isdir(self.path.parent):
            wrong = "is a folder" if is_folder else "lies in a folder that does not exist"
            raise ValueError(
                f"output {path} {wrong}; give the name of a file in an existing folder."
            )
        self.older: Path | None = None
        try:
            self.part = self._find_part()
        except OSError as error:
            raise ValueError(f"output {path} cannot be written ({error.strerror}).") from error
        self.width, self.height, self.fps, self._audio_rate = width, height, fps, audio_rate
        self._show, self._is_marked = show, is_marked
        self.num_frames = 0
        self._container = self._video = self._audio = None
        self._samples_written = 0
        self._waiting = np.zeros(0, np.float32)
        self._is_open = True

    def __enter__(self) -> "VideoWriter":
        return self

    def __exit__(self, kind: type | None, *exception: object) -> None:
        self.close(is_whole=kind is None)

    def write_frames(self, frames: UInt8[np.ndarray, "T H W 3"]) -> None:
        """Appends 8-bit RGB frames.

        Raises:
            ValueError: they are not of the size of the video, or the disk is full.
        """
        frames = self._show(frames)
        if frames.shape[1:3] != (self.height, self.width):
            raise ValueError(
                f"frames of {frames.shape[2]}x{frames.shape[1]} pixels for a video of "
                f"{self.width}x{self.height}; resize them first."
            )
        if not self._is_open:
            raise ValueError(f"output {self.path} is closed already; make another writer.")
        if self._container is None:
            self._create()
        for pixels in mark(frames) if self._is_marked else frames:
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
            frame.pts, frame.time_base = self.num_frames, Fraction(1, self.fps)
            # Counted first: an interrupt must not lead to two frames of the same time.
            self.num_frames += 1
            self._encode(self._video, frame)
        self._write_sound_up_to(self.num_frames)

    def write_audio(self, samples: Float[np.ndarray, " N"]) -> None:
        """Appends mono samples in [-1, 1]; they are written when their frames are."""
        if self._audio_rate is not None:
            self._waiting = np.concatenate([self._waiting, samples.astype(np.float32)])

    def close(self, *, is_whole: bool = True) -> None:
        """Ends the file; sound without frames is dropped, frames without sound are silent.

        Without a single frame there is no file, and an older one of that name stays.

        Args:
            is_whole: False after an interrupt or an error: an older file is kept then.
        """
        if not self._is_open:
            return
        self._is_open = False
        if self._container is None:
            return
        is_ended = False
        try:
            if self._audio is not None:
                missing = self._samples_until(self.num_frames) - self._samples_written
                missing -= len(self._waiting)
                self._waiting = np.pad(self._waiting, (0, max(0, missing)))
                self._write_sound_up_to(self.num_frames)
                self._encode(self._audio, None)
            self._encode(self._video, None)
            is_ended = is_whole
        finally:
            try:
                with self._explained():
                    self._container.close()
            except ValueError:
                is_ended = False
                raise
            finally:
                self._name(is_ended)

    def _find_part(self) -> Path:
        """A new name beside the file, checked to be writable."""
        target = Path(os.path.realpath(self.path))
        if target.exists() and not target.is_file():
            target.open("ab").close()
            return target
        is_new = not target.exists()
        target.open("ab").close()
        if is_new:
            target.unlink()
        # Names have at most 255 bytes, a character up to four of them.
        part = target.with_name(f"{target.stem[:50]}.part-{os.getpid()}{target.suffix}")
        part = _unused(part)
        part.open("xb").close()
        part.unlink()
        return part

    def _name(self, is_whole: bool) -> None:
        """Gives what was written the name of the file."""
        target = Path(os.path.realpath(self.path))
        if self.part == target or not self.part.exists():
            return
        with self._explained():
            if target.exists():
                shutil.copymode(target, self.part)
                if not is_whole:
                    self.older = _unused(
                        target.with_name(f"{target.stem[:50]}.before{target.suffix}")
                    )
                    os.replace(target, self.older)
            os.replace(self.part, target)

    def _create(self) -> None:
        kind = _SUFFIXES[self.path.suffix.lower()]
        options = _MATROSKA if kind == "matroska" else _MOV
        with self._explained():
            self._container = av.open(media_url(self.part), "w", format=kind, options=options)
        self._container.metadata["comment"] = COMMENT
        self._video = self._container.add_stream("libx264", rate=self.fps)
        self._video.width, self._video.height = self.width, self.height
        self._video.pix_fmt, self._video.time_base = "yuv420p", Fraction(1, self.fps)
        # No B-frames and no look-ahead: a frame leaves the encoder when it has come in.
        self._video.options = {"crf": "18", "preset": "veryfast", "tune": "zerolatency"}
        self._video.gop_size = self.fps
        if self._audio_rate is not None:
            self._audio = self._container.add_stream("aac", rate=self._audio_rate, layout="mono")
            self._audio.bit_rate = 96_000

    def _encode(self, stream: Any, frame: Any) -> None:
        with self._explained():
            self._container.mux(stream.encode(frame))

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except (OSError, av.FFmpegError) as error:
            raise ValueError(
                f"output {self.path} cannot be written after {self.num_frames} frames "
                f"({error.strerror}); free some space or choose another place."
            ) from error

    def _samples_until(self, frame: int) -> int:
        return frame * self._audio_rate // self.fps

    def _write_sound_up_to(self, frame: int) -> None:
        if self._audio is None:
            return
        count = min(self._samples_until(frame) - self._samples_written, len(self._waiting))
        if count <= 0:
            return
        samples, self._waiting = self._waiting[:count], self._waiting[count:]
        made = av.AudioFrame.from_ndarray(np.clip(samples, -1, 1)[None].copy(), "fltp", "mono")
        made.sample_rate = self._audio_rate
        made.pts, made.time_base = self._samples_written, Fraction(1, self._audio_rate)
        self._samples_written += count  # first, as above
        self._encode(self._audio, made)


def _unused(path: Path) -> Path:
    """The name, with a number behind it if it is taken."""
    names = (path.with_stem(f"{path.stem}-{i}") if i else path for i in itertools.count())
    return next(name for name in names if not os.path.lexists(name))


def read_video(
    path: str | Path,
) -> tuple[np.ndarray, float, np.ndarray | None, int | None]:
    """Reads a whole video.

    Returns:
        8-bit RGB frames `[T H W 3]`, frames per second, mono samples by their time stamps (None
        without sound), and their rate.

    Raises:
        ValueError: the file is missing, cannot be read, or has no picture.
    """
    try:
        with open_media(path) as container:
            frames, fps = [], 0.0
            if stream := best_stream(container, "video"):
                fps = float(stream.guessed_rate or 0)
                frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(stream)]
        if not frames:
            raise ValueError(f"{path} has no picture; expected a whole mp4, mov or mkv file.")
        with open_media(path) as container:
            if best_stream(container, "audio") is None:
                return np.stack(frames), fps, None, None
            return np.stack(frames), fps, *samples_by_time(container, str(path))
    except (OSError, av.FFmpegError) as error:
        raise ValueError(
            f"{path} cannot be read as a video ({error.strerror}); expected a whole mp4, mov or "
            "mkv file."
        ) from error


def samples_by_time(
    container: av.container.InputContainer, name: str, begin_s: float = 0.0
) -> tuple[np.ndarray, int]:
    """Mono samples of a file's sound, where their time stamps say, and their rate.

    Args:
        container: open for reading, with sound.
        name: of the file, in remarks.
        begin_s: time of sample 0; what lies before, as an encoder's priming, is left out.
    """
    mixer, parts, rate, end = Mixer(f"the sound of {name}"), [], 0, 0
    for frame in container.decode(best_stream(container, "audio")):
        part = mixer.frame(frame)
        rate = rate or frame.sample_rate
        if frame.sample_rate != rate:
            part = soxr.resample(part, frame.sample_rate, rate)
        if frame.pts is not None:
            start = round((float(frame.pts * frame.time_base) - begin_s) * rate)
            # Coarse time stamps are no reason to tear sound that follows on apart.
            if not parts or abs(start - end) > _JITTER_S * rate:
                end = start
        parts.append((max(0, end), part[max(0, -end) :]))
        end += len(part)
    mixer.finish()
    samples = np.zeros(max((start + len(part) for start, part in parts), default=0), np.float32)
    for start, part in parts:
        samples[start : start + len(part)] = part
    return samples, rate

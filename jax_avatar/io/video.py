"""Frames and samples -> a video file that plays even if it is never closed."""

import os
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from jaxtyping import UInt8

from jax_avatar.shapes import Float

__all__ = ["VideoWriter", "read_video"]

_SUFFIXES = {".mp4": "mp4", ".mov": "mov", ".mkv": "matroska"}
# One fragment per key frame and no index at the end: what is written is playable. The header
# waits for the first fragment, so that it can say how many samples of AAC priming to skip.
_FRAGMENTED = {"movflags": "frag_keyframe+delay_moov+default_base_moof", "flush_packets": "1"}


class VideoWriter:
    """H.264 and AAC, written as they come; use as a context manager.

    Video frame 0 and audio sample 0 are both at time 0.
    """

    def __init__(
        self, path: str | Path, width: int, height: int, fps: int, audio_rate: int | None = None
    ):
        """Creates the file.

        Args:
            path: ends in .mp4, .mov or .mkv; replaced if it exists.
            width: pixels, even.
            height: pixels, even.
            fps: frames per second.
            audio_rate: samples per second of the sound; None for a silent film.

        Raises:
            ValueError: an unknown kind of file, an odd size, a rate that cannot be, or a place
                that cannot be written.
        """
        self.path = Path(path)
        kind = _SUFFIXES.get(self.path.suffix.lower())
        if kind is None:
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
        try:
            with open(self.path, "wb"):
                pass
            options = _FRAGMENTED if kind != "matroska" else {"flush_packets": "1"}
            self._container = av.open(str(self.path), "w", format=kind, options=options)
        except (OSError, av.FFmpegError) as error:
            raise ValueError(f"output {path} cannot be written ({error.strerror}).") from error
        self.fps, self._audio_rate = fps, audio_rate
        self._video = self._container.add_stream("libx264", rate=fps)
        self._video.width, self._video.height, self._video.pix_fmt = width, height, "yuv420p"
        self._video.time_base = Fraction(1, fps)
        # No B-frames and no look-ahead: a frame leaves the encoder when it has come in.
        self._video.options = {"crf": "18", "preset": "veryfast", "tune": "zerolatency"}
        self._video.gop_size = max(1, fps)
        self._audio = None
        if audio_rate is not None:
            self._audio = self._container.add_stream("aac", rate=audio_rate, layout="mono")
            self._audio.bit_rate = 96_000
        self.num_frames = 0
        self._samples_written = 0
        self._waiting = np.zeros(0, np.float32)
        self._is_open = True

    def __enter__(self) -> "VideoWriter":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def write_frames(self, frames: UInt8[np.ndarray, "T H W 3"]) -> None:
        """Appends 8-bit RGB frames.

        Raises:
            ValueError: they are not of the size of the video.
        """
        if frames.shape[1:3] != (self._video.height, self._video.width):
            raise ValueError(
                f"frames of {frames.shape[2]}x{frames.shape[1]} pixels for a video of "
                f"{self._video.width}x{self._video.height}; resize them first."
            )
        for pixels in frames:
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
            frame.pts, frame.time_base = self.num_frames, Fraction(1, self.fps)
            self._container.mux(self._video.encode(frame))
            self.num_frames += 1
        self._write_sound_up_to(self.num_frames)

    def write_audio(self, samples: Float[np.ndarray, " N"]) -> None:
        """Appends mono samples in [-1, 1]; they are written when their frames are."""
        if self._audio is not None:
            self._waiting = np.concatenate([self._waiting, samples.astype(np.float32)])

    def close(self) -> None:
        """Ends the file; sound without frames is dropped, frames without sound are silent."""
        if not self._is_open:
            return
        self._is_open = False
        try:
            if self._audio is not None:
                missing = self._samples_until(self.num_frames) - self._samples_written
                missing -= len(self._waiting)
                self._waiting = np.pad(self._waiting, (0, max(0, missing)))
                self._write_sound_up_to(self.num_frames)
                self._container.mux(self._audio.encode(None))
            self._container.mux(self._video.encode(None))
        finally:
            self._container.close()

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
        self._container.mux(self._audio.encode(made))
        self._samples_written += count


def read_video(
    path: str | Path,
) -> tuple[np.ndarray, float, np.ndarray | None, int | None]:
    """Reads a whole video.

    Returns:
        8-bit RGB frames `[T H W 3]`, frames per second, mono samples by their time stamps (None
        without sound), and their rate.
    """
    with av.open(str(path)) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
        fps = float(container.streams.video[0].guessed_rate)
    with av.open(str(path)) as container:
        if not container.streams.audio:
            return np.stack(frames), fps, None, None
        rate = container.streams.audio[0].rate
        samples = np.zeros(0, np.float32)
        for frame in container.decode(audio=0):
            part = frame.to_ndarray().astype(np.float32).mean(0)
            start = round(float(frame.pts * frame.time_base) * rate)
            if start < 0:  # the encoder's priming
                part, start = part[-start:], 0
            samples = np.pad(samples, (0, max(0, start + len(part) - len(samples))))
            samples[start : start + len(part)] = part
    return np.stack(frames), fps, samples, rate

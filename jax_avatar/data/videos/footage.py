"""A video file as frames at a chosen rate and sound at 16 kHz, both on the file's own clock."""

from collections.abc import Iterator
from pathlib import Path

import av
import numpy as np
import soxr

from jax_avatar.io.media import best_stream, open_media
from jax_avatar.io.video import samples_by_time

__all__ = ["SAMPLE_RATE", "Footage"]

SAMPLE_RATE = 16_000
_LEAD_S = 1.0  # decoded before a part, since a file is entered at key frames only


class Footage:
    """One video file; frame `i` of it is what is seen at time `i / fps`.

    Attributes:
        path: of the file.
        fps: frames per second.
        has_sound: True if it has a track of sound.
        language: of the sound, as the file names it, such as "eng"; "" if it does not.
        begin_s: time in the file of frame 0, in seconds.
    """

    def __init__(self, path: str | Path, fps: int):
        """Looks at the file's header.

        Args:
            path: of anything that FFmpeg reads.
            fps: frames per second to show it at, whatever its own rate is.

        Raises:
            ValueError: it cannot be read, or has no picture.
        """
        self.path, self.fps = Path(path), fps
        try:
            with open_media(self.path) as container:
                picture = best_stream(container, "video")
                if picture is None:
                    raise ValueError(f"{path} has no picture")
                sound = best_stream(container, "audio")
                self.has_sound = sound is not None
                # "und" is undetermined.
                self.language = (sound.metadata.get("language", "") if sound else "").lower()
                self.language = "" if self.language == "und" else self.language
                self.begin_s = float((picture.start_time or 0) * picture.time_base)
                self._pixel_aspect = float(picture.sample_aspect_ratio or 1)
        except (OSError, av.FFmpegError) as error:
            raise ValueError(f"{path} cannot be read ({error.strerror})") from error

    def frames(self, start: int = 0, stop: int | None = None) -> Iterator[np.ndarray]:
        """Yields RGB frames `[H W 3]` uint8 from `start` to before `stop`, or to the end.

        Raises:
            ValueError: the file is broken.
        """
        number, before = start, None
        try:
            for time, picture in self._decoded(start / self.fps - _LEAD_S):
                # The nearer of the two pictures on either side of a frame's time is shown.
                while before is not None and number / self.fps < time:
                    is_nearer = number / self.fps - before[0] <= time - number / self.fps
                    yield self._pixels(before[1] if is_nearer else picture)
                    number += 1
                    if number == stop:
                        return
                before = time, picture
            # The last picture stays as long as a frame.
            if before is not None and number / self.fps <= before[0]:
                yield self._pixels(before[1])
        except (OSError, av.FFmpegError) as error:
            raise ValueError(f"{self.path} breaks off ({error.strerror})") from error

    def sound(self) -> np.ndarray:
        """Mono samples at 16 kHz, int16; sample 0 is at time 0, like frame 0."""
        try:
            with open_media(self.path) as container:
                samples, rate = samples_by_time(container, str(self.path), self.begin_s)
        except (OSError, av.FFmpegError) as error:
            raise ValueError(f"the sound of {self.path} breaks off ({error.strerror})") from error
        samples = soxr.resample(samples, rate, SAMPLE_RATE) if rate != SAMPLE_RATE else samples
        return np.round(np.clip(samples, -1, 1) * 32767).astype(np.int16)

    def _pixels(self, frame: av.VideoFrame) -> np.ndarray:
        """RGB as a player shows it, with square pixels and upright."""
        width = max(1, round(frame.width * self._pixel_aspect))
        pixels = frame.reformat(width, frame.height, "rgb24").to_ndarray()
        return _upright(pixels, frame)

    def _decoded(self, start_s: float) -> Iterator[tuple[float, av.VideoFrame]]:
        with open_media(self.path) as container:
            stream = best_stream(container, "video")
            stream.thread_type = "AUTO"
            if start_s > 0:
                container.seek(int((self.begin_s + start_s) / stream.time_base), stream=stream)
            for frame in container.decode(stream):
                if frame.pts is not None:
                    yield float(frame.pts * stream.time_base) - self.begin_s, frame


def _upright(pixels: np.ndarray, frame: av.VideoFrame) -> np.ndarray:
    """The picture as its display matrix has it: telephones film sideways, and selfies mirrored."""
    matrix = frame.side_data.get("DISPLAYMATRIX")
    if matrix is None:
        return pixels
    a, b, _, c, d = np.frombuffer(matrix, "<i4")[:5].astype(np.int64)
    if a * d - b * c < 0:
        pixels = pixels[:, ::-1]
        a, b = -a, -b
    turns = round(np.degrees(np.arctan2(b, a)) / 90)
    return np.rot90(pixels, -turns % 4)

"""Opens audio and video files with FFmpeg, through PyAV."""

from pathlib import Path
from typing import Any

import av
from av.stream import Disposition

__all__ = ["best_stream", "media_url", "open_media"]

# PyAV 19 keeps titles that are not UTF-8; older ones refuse the file unless told.
_MAJOR = int(av.__version__.partition(".")[0])
_LENIENT = {} if _MAJOR >= 19 else {"metadata_errors": "ignore"}


def open_media(path: str | Path | Any) -> av.container.InputContainer:
    """Opens a local file, or an open binary stream, for reading.

    Raises:
        OSError, av.FFmpegError: it cannot be read as a media file.
    """
    # From a pipe little at a time: what waits in a buffer is late.
    if hasattr(path, "read"):
        return av.open(path, "r", buffer_size=4096, **_LENIENT)
    return av.open(media_url(path), **_LENIENT)


def best_stream(container: av.container.InputContainer, kind: str) -> Any | None:
    """The track that a player takes; None if there is none.

    The cover of an album is no video.

    Args:
        container: open for reading.
        kind: "audio" or "video".
    """
    tracks = [
        stream
        for stream in getattr(container.streams, kind)
        if not stream.disposition & Disposition.attached_pic
    ]
    best = container.streams.best(kind)
    return best if best in tracks else next(iter(tracks), None)


def media_url(path: str | Path) -> str:
    """A file's name for FFmpeg, which would take the "12" of "12:30.wav" for a protocol."""
    return f"file:{path}"

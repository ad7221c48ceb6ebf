"""Opens audio and video files with FFmpeg, through PyAV."""

from pathlib import Path

import av

__all__ = ["media_url", "open_media"]

# PyAV 19 keeps titles that are not UTF-8; older ones refuse the file unless told.
_MAJOR = int(av.__version__.partition(".")[0])
_LENIENT = {} if _MAJOR >= 19 else {"metadata_errors": "ignore"}


def open_media(path: str | Path) -> av.container.InputContainer:
    """Opens a local file for reading.

    Raises:
        OSError, av.FFmpegError: it cannot be read as a media file.
    """
    return av.open(media_url(path), **_LENIENT)


def media_url(path: str | Path) -> str:
    """A file's name for FFmpeg, which would take the "12" of "12:30.wav" for a protocol."""
    return f"file:{path}"

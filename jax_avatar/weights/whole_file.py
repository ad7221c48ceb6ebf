"""Detection of incomplete files: cut downloads, pointers to large files, error pages."""

import json
import re
from pathlib import Path
from typing import Any

__all__ = ["BrokenFile", "check_whole", "read_object", "unfinished_downloads"]

_HEAD_BYTES = 512
_UNFINISHED = (".incomplete", ".part", ".partial", ".crdownload", ".aria2", ".download")
_CONTENT = (
    (b"PK\x03\x04", "a zip archive; weights that PyTorch saved are named .pth, .pt or .bin"),
    (b"\x80", "a pickle, which is never loaded; save its tensors as safetensors"),
    (b"\x1f\x8b", "a gzip archive; unpack it"),
    (b"\x89HDF", "an HDF5 file; save its tensors as safetensors"),
    (b"GGUF", "a GGUF file; download the original weights in safetensors"),
)


class BrokenFile(ValueError):
    """Incomplete or wrong file: truncated, a pointer, empty, or an error page."""


def check_whole(path: str | Path, *, is_text: bool = False) -> int:
    """Checks the first bytes of a file.

    Args:
        path: of the file.
        is_text: expected to hold text, such as JSON.

    Returns:
        Its size in bytes.

    Raises:
        BrokenFile: it cannot be read, or is empty, a pointer, an unfinished download, a web page
            or, unless `is_text`, other text.
    """
    path = Path(path)
    if path.suffix in _UNFINISHED:
        raise BrokenFile(f"{path} is an unfinished download; repeat the download to complete it.")
    try:
        with open(path, "rb") as file:
            head = file.read(_HEAD_BYTES)
        size = path.stat().st_size
    except OSError as error:
        raise BrokenFile(f"{path} cannot be read ({error.strerror or error}).") from error
    if not head:
        raise BrokenFile(f"{path} is empty; download or copy it again.")
    if problem := _problem(head, is_text=is_text):
        raise BrokenFile(f"{path} is {problem}.")
    return size


def content_kind(path: str | Path) -> str:
    """Another format, recognised by the first bytes of a file, or ""."""
    with open(path, "rb") as file:
        head = file.read(8)
    return next((kind for mark, kind in _CONTENT if head.startswith(mark)), "")


def read_object(path: str | Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
        BrokenFile: there is no such file, or it is not whole, or it holds something else.
    """
    path = Path(path)
    check_whole(path, is_text=True)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise BrokenFile(
            f"{path} cannot be read as JSON ({error}); it may be cut off: download or copy it "
            "again."
        ) from error
    if not isinstance(content, dict):
        raise BrokenFile(f"{path} holds {type(content).__name__}, expected a JSON object.")
    return content


def unfinished_downloads(folder: str | Path) -> list[Path]:
    """Incomplete downloads below a folder."""
    found = sorted(Path(folder).rglob("*"))
    return [path for path in found if path.suffix in _UNFINISHED and path.is_file()]


def _problem(head: bytes, *, is_text: bool) -> str:
    if head.startswith((b"version https://git-lfs", b"version https://hawser")):
        return "a Git LFS pointer, not the file itself; run git lfs pull, or download it again"
    if head.startswith(b"# xet"):
        return "a Xet pointer, not the file itself; download it again"
    if re.match(rb"(\xef\xbb\xbf)?\s*<(!doctype|html|head|\?xml)", head, re.IGNORECASE):
        return "a web page, perhaps of an error or a login; download the file again"
    if not is_text and _is_text(head):
        begin = head[:40].decode("ascii").split("\n")[0]
        return f"text that begins with {begin!r}, no weights; download the file again"
    return ""


def _is_text(head: bytes) -> bool:
    # The first bytes of safetensors are a length, and so never all printable.
    return all(32 <= byte < 127 or byte in b"\t\r\n" for byte in head)

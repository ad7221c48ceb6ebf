"""Checksums of a folder's weights: `checksums.json`, SHA-256 of every file as by `sha256sum`.

    {"sha256": {"vae.safetensors": "...", "dit/params/head.kernel/0.0": "..."}}

A network's files are found damaged, missing or exchanged when it loads. Folders without the file,
or without a network in it, load as well. Folders that have the file keep it up to date.
"""

import contextlib
import functools
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from jax_avatar.weights.whole_file import BrokenFile, read_object

try:
    import fcntl
except ModuleNotFoundError:  # Windows
    fcntl = None

__all__ = [
    "CHECKSUMS",
    "check_files",
    "file_sha256",
    "keep_checksums",
    "locked",
    "recorded",
    "rewriting",
    "take_lock",
]

CHECKSUMS = "checksums.json"
_THREADS = min(16, os.cpu_count() or 1)


def file_sha256(path: str | Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def keep_checksums(folder: str | Path) -> None:
    """Makes a folder keep checksums of the networks that are written into it from now on."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder):
        if not (folder / CHECKSUMS).exists():
            _write(folder, {})


def recorded(folder: str | Path, name: str | None = None) -> dict[str, str]:
    """Checksums in a folder: path below it -> SHA-256.

    Args:
        folder: of the model.
        name: of the network whose files to give; of all if not given.

    Raises:
        BrokenFile: there are some, which cannot be read.
    """
    path = Path(folder) / CHECKSUMS
    if not path.exists():
        return {}
    sums = read_object(path).get("sha256")
    if not isinstance(sums, dict) or not all(isinstance(v, str) for v in sums.values()):
        raise BrokenFile(
            f'{path} has no object "sha256" of checksums; copy it again, or delete it.'
        )
    return {file: digest for file, digest in sums.items() if name is None or _is_of(file, name)}


def check_files(folder: str | Path, files: Iterable[str]) -> None:
    """Compares files with their checksums, several at a time; files without one pass.

    Args:
        folder: that holds them.
        files: paths below it.

    Raises:
        BrokenFile: one is missing, damaged or another file; the message names it.
    """
    folder = Path(folder)
    sums = recorded(folder)
    listed = [file for file in files if file in sums]
    with ThreadPoolExecutor(_THREADS) as pool:
        digests = pool.map(lambda file: _digest(folder / file), listed)
        wrong = [file for file, found in zip(listed, digests, strict=True) if found != sums[file]]
    if wrong:
        more = f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""
        state = "differs from" if (folder / wrong[0]).is_file() else "is missing, and named in"
        raise BrokenFile(
            f"{folder / wrong[0]}{more} {state} {folder / CHECKSUMS}: damaged, or of another "
            "folder. Copy or convert it again; if it was exchanged on purpose, delete its lines "
            "there."
        )


@contextlib.contextmanager
def rewriting(folder: str | Path, name: str, *, source: str | Path | None = None) -> Iterator[None]:
    """Context for writing a network, after which a folder with checksums has the new ones.

    Args:
        folder: of the model.
        name: of the network: `name.safetensors` or `name/`.
        source: folder that the files are copied from, whose checksums then stay.
    """
    folder = Path(folder)
    if not (folder / CHECKSUMS).exists():
        yield
        return
    before = _exchange(folder, name, {})
    try:
        yield
    except BaseException:
        _exchange(folder, name, before)
        raise
    there = [folder / f"{name}.safetensors", *sorted((folder / name).rglob("*"))]
    files = [str(path.relative_to(folder).as_posix()) for path in there if path.is_file()]
    known = {} if source is None else recorded(source, name)
    with ThreadPoolExecutor(_THREADS) as pool:
        digests = pool.map(lambda file: known.get(file) or _digest(folder / file), files)
        _exchange(folder, name, dict(zip(files, digests, strict=True)))


@contextlib.contextmanager
def locked(folder: str | Path) -> Iterator[None]:
    """Lock of a folder that several processes write into."""
    with contextlib.ExitStack() as stack:
        # Some file systems have no locks.
        with contextlib.suppress(OSError):
            lock = os.open(folder, os.O_RDONLY)
            stack.callback(os.close, lock)
            if fcntl:
                fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def take_lock(folder: str | Path) -> Callable[[], None]:
    """Exclusive lock of a folder that one process at a time may write; returns its release.

    Raises:
        BlockingIOError: another one has it.
    """
    if fcntl is None:
        return lambda: None
    lock = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        raise
    except OSError:  # a file system without locks
        pass
    return functools.partial(os.close, lock)


def _exchange(folder: Path, name: str, sums: dict[str, str]) -> dict[str, str]:
    """Replaces a network's checksums, and returns the old ones."""
    with locked(folder):
        present = recorded(folder)
        old = {file: digest for file, digest in present.items() if _is_of(file, name)}
        if old == sums:
            return old
        kept = {file: digest for file, digest in present.items() if file not in old}
        _write(folder, kept | sums)
    return old


def _write(folder: Path, sums: dict[str, str]) -> None:
    temporary = folder / f".{CHECKSUMS}.tmp"
    content = {"sha256": dict(sorted(sums.items()))}
    temporary.write_text(json.dumps(content, indent=2) + "\n")
    os.replace(temporary, folder / CHECKSUMS)


def _is_of(file: str, name: str) -> bool:
    return file == f"{name}.safetensors" or file.startswith(f"{name}/")


def _digest(path: Path) -> str:
    try:
        return file_sha256(path)
    except FileNotFoundError:
        return ""

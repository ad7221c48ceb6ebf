"""Text to speech: Flite if installed, or a function by its name."""

import importlib
import shutil
import subprocess
import tempfile
import wave
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

__all__ = ["Speak", "find_speech", "flite"]

Speak = Callable[[str], tuple[Any, int]]
"""Text -> mono samples (floats in [-1, 1] or int16) and samples per second; called in a thread. It
raises ValueError for a text that it cannot speak; the client gets the message."""

_LONGEST_S = 30.0


def flite(text: str) -> tuple[np.ndarray, int]:
    """English speech of the program Flite, voice slt.

    Args:
        text: unprintable characters are read as spaces.

    Returns:
        Mono int16 samples, and samples per second.

    Raises:
        ValueError: the text has no words, or Flite is missing or fails.
    """
    program = shutil.which("flite")
    if program is None:
        raise ValueError("Flite is not installed; install it with: apt-get install flite.")
    words = "".join(x if x.isprintable() else " " for x in text)
    if not any(x.isalnum() for x in words):
        raise ValueError(f"text {text[:40]!r} cannot be spoken; give words.")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "speech.wav"
        command = [program, "-voice", "slt", "-t", words, "-o", str(path)]
        try:
            subprocess.run(command, capture_output=True, check=True, timeout=_LONGEST_S)
            with wave.open(str(path)) as file:
                samples = np.frombuffer(file.readframes(file.getnframes()), "<i2")
                return samples, file.getframerate()
        except (subprocess.SubprocessError, OSError, wave.Error, EOFError) as error:
            raise ValueError(f"text {text[:40]!r} could not be spoken.") from error


def find_speech(name: str) -> Speak | None:
    """Function for a value of `--tts`.

    Args:
        name: "flite", MODULE:NAME of a function as `Speak`, or empty for none.

    Returns:
        The function; None for an empty name, or if Flite is not installed.

    Raises:
        ValueError: the module or function does not exist.
    """
    if name in ("", "flite"):
        return flite if name and shutil.which("flite") else None
    module, _, function = name.partition(":")
    try:
        found = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError, TypeError) as error:
        raise ValueError(
            f"--tts {name}: {error}; expected flite, or MODULE:NAME of a function "
            "text -> (samples, rate)."
        ) from error
    if not callable(found):
        raise ValueError(f"--tts {name} is not a function; expected text -> (samples, rate).")
    return found

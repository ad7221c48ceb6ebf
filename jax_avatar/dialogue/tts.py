"""Text -> speech, for clients that type: Flite where it is installed, or a function by its name."""

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
"""Text -> mono samples (floats in [-1, 1] or int16) and samples per second; may take its time. A
text that it cannot speak is a ValueError, whose message the client is told."""

_LONGEST_S = 30.0


def flite(text: str) -> tuple[np.ndarray, int]:
    """Speaks English with the program Flite, in its voice slt.

    Raises:
        ValueError: there is nothing to say, or Flite is missing or fails.
    """
    program = shutil.which("flite")
    if program is None:
        raise ValueError("no speech: install the package flite (apt-get install flite).")
    words = "".join(x if x.isprintable() else " " for x in text)
    if not any(x.isalnum() for x in words):
        raise ValueError(f"text {text[:40]!r}: nothing in it can be spoken; give words.")
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
    """The function that `--tts` names.

    Args:
        name: "flite", MODULE:NAME of a function as `Speak`, or empty for none.

    Returns:
        The function; None where none is wanted, or Flite is not installed.

    Raises:
        ValueError: there is no such module or function.
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

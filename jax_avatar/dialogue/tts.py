"""Text to speech: hibari or Flite where installed, an endpoint, or a function by its name."""

import functools
import importlib.util
import io
import shutil
import subprocess
import tempfile
import wave
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from jax_avatar.dialogue.packages import check_url, check_weights, named_function, network_lock

__all__ = ["Speak", "SpeechEndpoint", "find_speech", "flite", "hibari"]

Speak = Callable[[str], tuple[Any, int]]
"""Text -> mono samples (floats in [-1, 1] or int16) and samples per second; called in a thread. It
raises ValueError for a text that it cannot speak; the client gets the message."""

_LONGEST_S = 30.0
_ENDPOINT_S = 10.0


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


def hibari(text: str) -> tuple[np.ndarray, int]:
    """English speech of hibari, 80 times as fast as it is heard on one core.

    Args:
        text: unprintable characters are read as spaces.

    Returns:
        Mono float samples, and samples per second.

    Raises:
        ValueError: the text has no words, or hibari fails.

    Source: package `hibari-tts` (Apache-2.0), distilled from Kokoro-82M.
    """
    speak = _hibari()
    samples = speak("".join(x if x.isprintable() else " " for x in text))
    if not len(samples):
        raise ValueError(f"text {text[:40]!r} cannot be spoken; give words.")
    return np.clip(samples, -1, 1), speak.sample_rate


@functools.cache
def _hibari() -> Any:
    """The synthesiser, which speaks for one thread at a time."""
    import hibari as package

    check_weights(Path(package.__file__).parent / "assets" / "hibari.onnx", "hibari-tts")
    lock = network_lock()

    class Locked(package.Hibari):
        def __call__(self, text: str) -> np.ndarray:
            with lock:
                parts = [part for part in self.stream(text, seed=0) if len(part)]
            return np.concatenate(parts) if parts else np.zeros(0, np.float32)

    return Locked()


class SpeechEndpoint:
    """A `Speak` that asks `POST {url}/audio/speech`, as OpenAI's, for a WAV file."""

    def __init__(self, url: str, model: str, voice: str, *, key: str = "", transport: Any = None):
        """Does not connect yet.

        Args:
            url: base address.
            model: its name at the server.
            voice: its name at the server.
            key: bearer token; empty for none.
            transport: of the HTTP client; its own if not given.

        Raises:
            ValueError: the address is none.
            ModuleNotFoundError: httpx2 is not installed.
        """
        import httpx2

        self._url = f"{check_url(url, '--tts')}/audio/speech"
        self._body = {"model": model, "voice": voice, "response_format": "wav"}
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._failures = (httpx2.HTTPError,)
        self._client = httpx2.Client(headers=headers, timeout=_ENDPOINT_S, transport=transport)

    def __call__(self, text: str) -> tuple[np.ndarray, int]:
        """Speech of a text; see `Speak`."""
        try:
            response = self._client.post(self._url, json=self._body | {"input": text})
        except self._failures as error:
            raise ValueError(f"the voice cannot be reached ({type(error).__name__}).") from None
        if response.status_code != 200:
            raise ValueError(f"the voice answered HTTP {response.status_code}; check --tts.")
        return _read_wav(response.content)


def _read_wav(data: bytes) -> tuple[np.ndarray, int]:
    """Samples of a WAV file; one that was streamed does not know its length."""
    try:
        with wave.open(io.BytesIO(data)) as file:
            form = (file.getnchannels(), file.getsampwidth())
            samples, rate = file.readframes(len(data)), file.getframerate()
    except (wave.Error, EOFError) as error:
        raise ValueError(f"the voice sent no WAV file ({error}).") from None
    if form != (1, 2):
        raise ValueError(
            f"the voice sent WAV of {form[0]} channels and {8 * form[1]} bits; expected 1 and 16."
        )
    samples = np.frombuffer(samples[: len(samples) // 2 * 2], "<i2")
    if not len(samples):
        raise ValueError("the voice sent no sound.")
    return samples, rate


def find_speech(name: str, model: str = "", voice: str = "", *, key: str = "") -> Speak | None:
    """Function for a value of `--tts`.

    Args:
        name: "hibari", "flite", "auto" for the first of them that is installed, the address of an
            OpenAI-compatible endpoint, MODULE:NAME of a function as `Speak`, or empty for none.
        model: name of the model at the endpoint.
        voice: its voice.
        key: access token of the endpoint.

    Returns:
        The function; None for an empty name, or if it is not installed.

    Raises:
        ValueError: the module or function does not exist, the address is none, or weights are not
            the known ones.
        ModuleNotFoundError: hibari is named and not installed.
    """
    if name == "auto":
        name = "hibari" if importlib.util.find_spec("hibari") else "flite"
    if name in ("", "flite"):
        return flite if name and shutil.which("flite") else None
    if name == "hibari":
        hibari("Hello.")  # the first text takes a second more, for its lexicon
        return hibari
    if "://" in name:
        return SpeechEndpoint(name, model or "tts-1", voice or "alloy", key=key.strip())
    return named_function(name, "--tts", "hibari, flite, an address, or", "text -> (samples, rate)")

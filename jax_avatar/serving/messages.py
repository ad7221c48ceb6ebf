"""Messages between client and server, version 1; the protocol is in `docs/serving.md`.

Text messages are JSON objects with a "type". Binary messages are 16-bit PCM on the way in, and
fragments of MP4 on the way out.
"""

import base64
import binascii
import json
import re
from dataclasses import dataclass
from typing import Any

__all__ = ["VERSION", "ClientMessage", "Limits", "ProtocolError", "read_message"]

VERSION = 1

# Fields of each message: name -> (type, whether it must be there).
_SCHEMA = {
    "session.create": {
        "version": (int, True),
        "token": (str, False),
        "portrait": (str, False),
        "prompt": (str, False),
        "sample_rate": (int, False),
        "consent": (bool, False),
        "sdp": (str, False),
    },
    "audio.append": {"audio": (str, True)},
    "audio.commit": {},
    "speech.create": {"text": (str, True)},
    "clear": {},
    "prompt.update": {"text": (str, True)},
    "state.update": {"state": (str, True)},
    "close": {},
}
_BASE64 = {"portrait", "audio"}
_UNUSABLE = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff]")
_LARGEST = 2**31 - 1


@dataclass(frozen=True)
class Limits:
    """Message types that a client may send.

    Attributes:
        portrait_bytes: of an image file.
        portrait_pixels: of an image, decoded.
        audio_bytes: of one message of audio.
        prompt_chars: of a prompt.
        speech_chars: of a text to be spoken.
        sdp_chars: of a WebRTC offer.
        messages_per_s: sustained; bursts of ten seconds' worth are fine.
        errors: bad messages before the connection is closed.
    """

    portrait_bytes: int = 8_000_000
    portrait_pixels: int = 50_000_000
    audio_bytes: int = 1_000_000
    prompt_chars: int = 2000
    speech_chars: int = 500
    sdp_chars: int = 50_000
    messages_per_s: float = 200.0
    errors: int = 20

    @property
    def message_bytes(self) -> int:
        """Of any message: a portrait in base64 and what goes with it."""
        return self.portrait_bytes * 4 // 3 + 4 * self.prompt_chars + 2 * self.sdp_chars + 4096


class ProtocolError(ValueError):
    """Invalid client message.

    Attributes:
        code: for programs: "bad_message", "too_large", "unauthorised", "busy", ...
    """

    def __init__(self, code: str, message: str):
        super().__init__(message)
        self.code = code


@dataclass(frozen=True)
class ClientMessage:
    """A checked message: its type, and its fields with base64 decoded."""

    type: str
    fields: dict[str, Any]


def read_message(message: str | bytes, limits: Limits) -> ClientMessage:
    """Checks a message of a client.

    Raises:
        ProtocolError: it is not one of the protocol, or too large.
    """
    if isinstance(message, bytes):
        return _checked_sizes(ClientMessage("audio.append", {"audio": message}), limits)
    try:
        content = json.loads(message, object_pairs_hook=_unique, parse_constant=_refused)
    except (ValueError, RecursionError):
        raise ProtocolError("bad_message", "expected a JSON object.") from None
    if not isinstance(content, dict) or not isinstance(content.get("type"), str):
        raise ProtocolError("bad_message", 'expected a JSON object with a "type".')
    kind = content.pop("type")
    if kind not in _SCHEMA:
        raise ProtocolError("bad_message", f"type {kind[:40]!r}; expected one of {list(_SCHEMA)}.")
    schema = _SCHEMA[kind]
    if unknown := sorted(content.keys() - schema.keys()):
        raise ProtocolError("bad_message", f"{kind}: field {unknown[0][:40]!r} is unknown.")
    for name, (wanted, is_needed) in schema.items():
        if content.get(name) is None:
            content.pop(name, None)
            if is_needed:
                raise ProtocolError("bad_message", f"{kind}: field {name!r} is missing.")
        elif not isinstance(content[name], wanted) or (
            wanted is int and isinstance(content[name], bool)
        ):
            raise ProtocolError("bad_message", f"{kind}: {name!r} must be a {wanted.__name__}.")
        elif name in _BASE64:
            content[name] = _decoded(name, content[name])
        else:
            _check_value(name, content[name])
    return _checked_sizes(ClientMessage(kind, content), limits)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(dict(pairs)) < len(pairs):
        raise ValueError("a key stands twice in one object")
    return dict(pairs)


def _refused(constant: str) -> float:
    raise ValueError(f"{constant} is no JSON")


def _check_value(name: str, value: Any) -> None:
    """Refuses numbers and texts that nobody could use; a token is only ever compared."""
    if isinstance(value, int) and abs(value) > _LARGEST:
        raise ProtocolError("bad_message", f"{name!r} is out of range.")
    if isinstance(value, str) and name != "token" and _UNUSABLE.search(value):
        raise ProtocolError(
            "bad_message", f"{name!r} holds control characters, or halves of surrogate pairs."
        )


def _decoded(name: str, text: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise ProtocolError("bad_message", f"{name!r} is not base64.") from None


def _checked_sizes(message: ClientMessage, limits: Limits) -> ClientMessage:
    most = {
        "portrait": limits.portrait_bytes,
        "audio": limits.audio_bytes,
        "prompt": limits.prompt_chars,
        "text": limits.speech_chars if message.type == "speech.create" else limits.prompt_chars,
        "token": 1000,
        "sdp": limits.sdp_chars,
    }
    for name, limit in most.items():
        value = message.fields.get(name)
        if value is not None and len(value) > limit:
            raise ProtocolError("too_large", f"{name!r} of {len(value)}; at most {limit}.")
    return message

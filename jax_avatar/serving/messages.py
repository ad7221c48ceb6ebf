"""Messages of clients, version 1; the protocol is in `docs/serving.md`.

Text messages are JSON objects with a "type". A binary message is 16-bit PCM.
"""

import base64
import json
import re
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from pydantic_core import PydanticCustomError

from jax_avatar.portraits.view import FRAMES

__all__ = [
    "VERSION",
    "AudioAppend",
    "AudioCommit",
    "Clear",
    "Close",
    "Limits",
    "Message",
    "PromptUpdate",
    "ProtocolError",
    "SessionCreate",
    "SpeechCreate",
    "StateUpdate",
    "UserAppend",
    "UserCommit",
    "UserText",
    "read_message",
]

VERSION = 1

_UNUSABLE = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff]")
_LARGEST = 2**31 - 1


@dataclass(frozen=True)
class Limits:
    """Limits of clients' messages.

    Attributes:
        portrait_bytes: of an image file.
        portrait_pixels: of an image, decoded.
        audio_bytes: of one message of audio.
        token_chars: of an access token.
        prompt_chars: of a prompt.
        speech_chars: of a text to be spoken.
        sdp_chars: of a WebRTC offer.
        messages_per_s: sustained rate; bursts of ten seconds' worth are allowed.
        errors: invalid messages before the connection is closed.
        first_message_s: seconds until `session.create` must come.
        connect_s: seconds from the answer to a WebRTC offer until the data channel must be open.
        vanished_s: seconds without a WebRTC packet until a client counts as gone.
    """

    portrait_bytes: int = 8_000_000
    portrait_pixels: int = 50_000_000
    audio_bytes: int = 1_000_000
    token_chars: int = 1000
    prompt_chars: int = 2000
    speech_chars: int = 500
    sdp_chars: int = 50_000
    messages_per_s: float = 200.0
    errors: int = 20
    first_message_s: float = 10.0
    connect_s: float = 10.0
    vanished_s: float = 15.0

    @property
    def message_bytes(self) -> int:
        """Size of the largest message: a portrait in base64 with all other fields."""
        return self.portrait_bytes * 4 // 3 + 4 * self.prompt_chars + 2 * self.sdp_chars + 4096


class ProtocolError(ValueError):
    """Invalid client message.

    Attributes:
        code: for programs: "bad_message", "too_large", "unauthorised", "busy", ...
    """

    def __init__(self, code: str, message: str):
        super().__init__(message)
        self.code = code


def _at_most(limit: str) -> AfterValidator:
    """Limits the length of a field to that of the server's `Limits`."""

    def check(value: Any, info: Any) -> Any:
        if len(value) > (most := getattr(info.context, limit)):
            sizes = {"size": len(value), "most": most}
            raise PydanticCustomError("too_large", "Size {size}; at most {most}", sizes)
        return value

    return AfterValidator(check)


def _check_text(text: str) -> str:
    if _UNUSABLE.search(text):
        raise PydanticCustomError("text", "Control characters or unpaired surrogates")
    return text


def _decode(data: Any) -> bytes:
    """Bytes of a binary message, or of base64."""
    try:
        return data if isinstance(data, bytes) else base64.b64decode(data, validate=True)
    except (ValueError, TypeError):
        raise PydanticCustomError("base64", "Input should be base64") from None


_Text = Annotated[str, AfterValidator(_check_text)]
_Base64 = Annotated[bytes, BeforeValidator(_decode)]


class Message(BaseModel):
    """Message of a client; unknown fields and converted types are errors."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)


class SessionCreate(Message):
    """First message: access and settings of a session."""

    version: Annotated[int, Field(ge=-_LARGEST, le=_LARGEST)]
    token: Annotated[str, _at_most("token_chars")] | None = None  # only ever compared
    portrait: Annotated[_Base64, _at_most("portrait_bytes")] | None = None
    face: Annotated[int, Field(ge=1, le=_LARGEST)] | None = None
    frame: Literal[FRAMES] | None = None
    prompt: Annotated[_Text, _at_most("prompt_chars")] | None = None
    sample_rate: Annotated[int, Field(ge=8000, le=96_000)] | None = None
    consent: bool | None = None
    sdp: Annotated[_Text, _at_most("sdp_chars")] | None = None


class AudioAppend(Message):
    """Speech: 16-bit little-endian PCM."""

    audio: Annotated[_Base64, _at_most("audio_bytes")]


class AudioCommit(Message):
    """End of an utterance."""


class SpeechCreate(Message):
    """Text to be spoken."""

    text: Annotated[_Text, _at_most("speech_chars")]


class Clear(Message):
    """Interrupt."""


class PromptUpdate(Message):
    """New prompt."""

    text: Annotated[_Text, _at_most("prompt_chars")]


class StateUpdate(Message):
    """State of the conversation."""

    state: Annotated[_Text, _at_most("prompt_chars")]


class UserAppend(Message):
    """Sound of the user's microphone, for a conversation: 16-bit little-endian PCM."""

    audio: Annotated[_Base64, _at_most("audio_bytes")]


class UserCommit(Message):
    """End of what the user says."""


class UserText(Message):
    """Text that the user typed, for a conversation."""

    text: Annotated[_Text, _at_most("speech_chars")]


class Close(Message):
    """End of the session."""


_TYPES = {
    "session.create": SessionCreate,
    "audio.append": AudioAppend,
    "audio.commit": AudioCommit,
    "speech.create": SpeechCreate,
    "clear": Clear,
    "prompt.update": PromptUpdate,
    "state.update": StateUpdate,
    "user.append": UserAppend,
    "user.commit": UserCommit,
    "user.text": UserText,
    "close": Close,
}


def read_message(message: str | bytes, limits: Limits) -> Message:
    """Parses and validates a message.

    Raises:
        ProtocolError: it does not follow the protocol, or is too large.
    """
    if isinstance(message, bytes):
        return _validated("audio.append", {"audio": message}, limits)
    try:
        content = json.loads(message, object_pairs_hook=_unique, parse_constant=_refuse)
    except (ValueError, RecursionError):
        raise ProtocolError("bad_message", "expected a JSON object.") from None
    if not isinstance(content, dict) or not isinstance(content.get("type"), str):
        raise ProtocolError("bad_message", 'expected a JSON object with a "type".')
    kind = content.pop("type")
    if kind not in _TYPES:
        raise ProtocolError("bad_message", f"type {kind[:40]!r}; expected one of {list(_TYPES)}.")
    return _validated(kind, content, limits)


def _validated(kind: str, content: dict[str, Any], limits: Limits) -> Message:
    try:
        return _TYPES[kind].model_validate(content, context=limits)
    except ValidationError as invalid:
        error = invalid.errors(include_url=False, include_input=False)[0]
        name = str(next(iter(error["loc"]), "a field's name"))[:40]
        code = "too_large" if error["type"] == "too_large" else "bad_message"
        raise ProtocolError(code, f"{kind}: {name!r}: {error['msg']}.") from None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(dict(pairs)) < len(pairs):
        raise ValueError("duplicate key")
    return dict(pairs)


def _refuse(constant: str) -> float:
    raise ValueError(f"{constant} is not JSON")

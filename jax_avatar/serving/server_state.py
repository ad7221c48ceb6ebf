"""Admission control: shared state, access tokens, origins, free sessions."""

import asyncio
import hmac
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from jax_avatar.dialogue.tts import Speak
from jax_avatar.io.faces import face_missing
from jax_avatar.io.image import decode_image, prepare_reference
from jax_avatar.live.session import LiveSettings
from jax_avatar.serving.messages import VERSION, Limits, ProtocolError
from jax_avatar.serving.metrics import Metrics
from jax_avatar.serving.pool import Seats

if TYPE_CHECKING:
    from jax_avatar.serving.conversation import Conversation

__all__ = ["ServerState", "admit"]


@dataclass
class ServerState:
    """State shared by all sessions.

    Attributes:
        seats: sessions that are warm.
        portrait: for clients that bring none, `[H W 3]` uint8.
        token: that every client must know; empty lets everybody in.
        live: pace and delay.
        limits: what clients may send.
        metrics: what is counted.
        encode_prompt: prompt -> states, where the model takes one.
        speak: text -> speech, for clients that type; None where there is none.
        idle_s: without a message for so long, a session is ended.
        ice_servers: that help WebRTC to find a way, as `rtc.ice_server` reads them.
        is_marked: every frame carries the watermark.
        is_draining: no session may begin, since the server is about to stop.
        connections: under way.
        tasks: that serve those which no request waits for.
    """

    seats: Seats
    portrait: np.ndarray
    token: str = ""
    live: LiveSettings = field(default_factory=LiveSettings)
    limits: Limits = field(default_factory=Limits)
    metrics: Metrics = field(default_factory=Metrics)
    encode_prompt: Callable[[str], Any] | None = None
    speak: Speak | None = None
    idle_s: float = 300.0
    ice_servers: tuple[str, ...] = ()
    is_marked: bool = True
    is_draining: bool = False
    connections: set["Conversation"] = field(default_factory=set)
    tasks: set[asyncio.Task] = field(default_factory=set)

    def allows(self, token: str | None) -> bool:
        """True if the access token is valid."""
        # A client's may hold halves of surrogate pairs.
        given = (token or "").encode(errors="surrogatepass")
        return not self.token or hmac.compare_digest(given, self.token.encode())


async def admit(state: ServerState, wanted: dict[str, Any]) -> tuple[np.ndarray, Any, list[str]]:
    """Portrait, prompt states and warnings of a client that is admitted.

    Args:
        state: of the server.
        wanted: fields of `session.create`.

    Raises:
        ProtocolError: it may not, or brings what cannot be used.
    """
    if not state.allows(wanted.get("token")):
        raise ProtocolError("unauthorised", "the token is missing or wrong.")
    if wanted["version"] != VERSION:
        raise ProtocolError(
            "version", f"version {wanted['version']}; this server speaks {VERSION}."
        )
    if state.is_draining:
        raise ProtocolError("draining", "this server is about to stop; try another.")
    if not state.seats.is_ready:
        raise ProtocolError("starting", "the model is being compiled; try again soon.")
    rate = wanted.get("sample_rate", 16_000)
    if not 8000 <= rate <= 96_000:
        raise ProtocolError("bad_message", f"sample_rate {rate}; expected 8000 to 96000.")
    try:
        (portrait, warnings), text = await asyncio.to_thread(_portrait, state, wanted), None
        if wanted.get("prompt"):
            if state.encode_prompt is None:
                raise ProtocolError("no_prompt", "this model takes no prompt.")
            text = await asyncio.to_thread(state.encode_prompt, wanted["prompt"])
    except ProtocolError:
        raise
    except ValueError as error:
        raise ProtocolError("bad_portrait", str(error)) from None
    return portrait, text, warnings


def _portrait(state: ServerState, wanted: dict[str, Any]) -> tuple[np.ndarray, list[str]]:
    """The client's portrait, or the server's, in the size of the video, and warnings about it."""
    if "portrait" in wanted:
        if not wanted.get("consent"):
            raise ProtocolError(
                "consent", "a portrait needs consent: true, that the person agrees."
            )
        image = decode_image(wanted["portrait"], most_pixels=state.limits.portrait_pixels)
        portrait = prepare_reference(image, *state.seats.size, cover=True)
        missing = face_missing("the portrait", image, portrait)
        return portrait, [missing] if missing else []
    return prepare_reference(state.portrait, *state.seats.size, cover=True), []

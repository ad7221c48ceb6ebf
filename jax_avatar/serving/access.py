"""Access control: tokens, origins, and the admission of a client."""

import asyncio
import hmac
from typing import Any
from urllib.parse import urlsplit

import numpy as np
from starlette.datastructures import Headers

from jax_avatar.io.image import decode_image, prepare_reference
from jax_avatar.portraits.faces import face_missing
from jax_avatar.serving.messages import VERSION, ProtocolError, SessionCreate
from jax_avatar.serving.server_state import ServerState

__all__ = ["admit", "is_cross_origin", "is_valid_token"]


def is_valid_token(state: ServerState, token: str | None) -> bool:
    """True if a client's access token is the server's; any will do for a server without one."""
    # A client's may hold unpaired surrogates.
    given = (token or "").encode(errors="surrogatepass")
    return not state.token or hmac.compare_digest(given, state.token.encode())


def is_cross_origin(headers: Headers) -> bool:
    """True for a browser's request from a page of another origin."""
    origin = headers.get("origin")
    try:
        return bool(origin) and urlsplit(origin).netloc != headers.get("host")
    except ValueError:  # not a URL
        return True


async def admit(state: ServerState, create: SessionCreate) -> tuple[np.ndarray, Any, list[str]]:
    """Checks `session.create` against the server's state.

    Args:
        state: of the server.
        create: first message of the client.

    Returns:
        The portrait in the size of the video, prompt states or None, and warnings.

    Raises:
        ProtocolError: the client is not admitted, or its portrait or prompt is unusable.
    """
    if not is_valid_token(state, create.token):
        raise ProtocolError("unauthorised", "the token is missing or wrong.")
    if create.version != VERSION:
        raise ProtocolError("version", f"version {create.version}; this server speaks {VERSION}.")
    if state.is_draining:
        raise ProtocolError("draining", "this server is about to stop; try another.")
    if not state.pool.is_ready:
        raise ProtocolError("starting", "the model is being compiled; try again soon.")
    try:
        (portrait, warnings), text = await asyncio.to_thread(_portrait, state, create), None
        if create.prompt:
            if state.encode_prompt is None:
                raise ProtocolError("no_prompt", "this model takes no prompt.")
            text = await asyncio.to_thread(state.encode_prompt, create.prompt)
    except ProtocolError:
        raise
    except ValueError as error:
        raise ProtocolError("bad_portrait", str(error)) from None
    return portrait, text, warnings


def _portrait(state: ServerState, create: SessionCreate) -> tuple[np.ndarray, list[str]]:
    """The client's portrait, else the server's, in the size of the video; and warnings about it."""
    if create.portrait is not None:
        if not create.consent:
            raise ProtocolError(
                "consent", "a portrait needs consent: true, that the person agrees."
            )
        image = decode_image(create.portrait, most_pixels=state.limits.portrait_pixels)
        portrait = prepare_reference(image, *state.pool.size, cover=True)
        missing = face_missing("the portrait", image, portrait)
        return portrait, [missing] if missing else []
    return prepare_reference(state.portrait, *state.pool.size, cover=True), []

"""Access control: tokens, origins, and the admission of a client."""

import asyncio
import dataclasses
import hmac
from typing import Any
from urllib.parse import urlsplit

from starlette.datastructures import Headers

from jax_avatar.io.image import decode_image
from jax_avatar.portraits.view import ShownPortrait
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


async def admit(state: ServerState, create: SessionCreate) -> tuple[ShownPortrait, Any]:
    """Checks `session.create` against the server's state.

    Args:
        state: of the server.
        create: first message of the client.

    Returns:
        The portrait in the size of the stream, and prompt states or None.

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
        portrait, text = await asyncio.to_thread(_portrait, state, create), None
        if create.prompt:
            if state.encode_prompt is None:
                raise ProtocolError("no_prompt", "this model takes no prompt.")
            text = await asyncio.to_thread(state.encode_prompt, create.prompt)
    except ProtocolError:
        raise
    except ValueError as error:
        raise ProtocolError("bad_portrait", str(error)) from None
    return portrait, text


def _portrait(state: ServerState, create: SessionCreate) -> ShownPortrait:
    """The client's portrait, else the server's, in the size of the stream."""
    chosen = {k: v for k in ("face", "frame") if (v := getattr(create, k)) is not None}
    if create.portrait is None:
        view, is_known = dataclasses.replace(state.view, **chosen), "face" not in chosen
        return view.portrait(
            state.portrait, state.pool.size, is_known=is_known, name="the portrait"
        )
    if not create.consent:
        raise ProtocolError("consent", "a portrait needs consent: true, that the person agrees.")
    image = decode_image(create.portrait, most_pixels=state.limits.portrait_pixels)
    # The server's choice of a face is for its own portrait.
    view = dataclasses.replace(state.view, **{"face": None, **chosen})
    return view.portrait(image, state.pool.size, name="the portrait")

"""Client on a WebSocket: JSON and PCM come in, JSON and fragmented MP4 go out."""

import asyncio
import time
from typing import Any

from starlette.websockets import WebSocket, WebSocketDisconnect

from jax_avatar.io.fragments import FragmentWriter
from jax_avatar.live.session import LiveChunk, LiveSession
from jax_avatar.serving.conversation import Closed, Conversation, Gone, Link
from jax_avatar.serving.messages import ProtocolError, SessionCreate
from jax_avatar.serving.server_state import ServerState

__all__ = ["serve_socket"]

_SLOW_CLIENT_S = 5.0  # until a message must be taken


async def serve_socket(socket: WebSocket, state: ServerState) -> None:
    """Serves one client; returns when it has left or was disconnected."""
    await socket.accept()
    await Conversation(_SocketLink(socket, state), state).run()


class _SocketLink(Link):
    protocol = "websocket"

    def __init__(self, socket: WebSocket, state: ServerState):
        self._socket, self._metrics = socket, state.metrics
        self._writer: FragmentWriter | None = None
        self._sending = asyncio.Lock()

    def check(self, create: SessionCreate) -> None:
        if create.sdp is not None:
            raise ProtocolError("bad_message", "sdp is for POST /v1/rtc; leave it out here.")

    async def open(self, live: LiveSession, size: tuple[int, int]) -> dict[str, Any]:
        form, (height, width) = live.session.format, size
        self._writer = FragmentWriter(width, height, form.fps, form.sample_rate)
        return {"mime": self._writer.mime, "delay_s": self._writer.delay_s}

    async def receive(self) -> str | bytes:
        received = await self._socket.receive()
        if received["type"] == "websocket.disconnect":
            raise Gone
        text = received.get("text")
        return received["bytes"] if text is None else text

    async def send(self, text: str) -> None:
        await self._sent(self._socket.send_text(text))

    async def show(self, chunk: LiveChunk) -> None:
        began = time.monotonic()
        data = await asyncio.to_thread(self._writer.write, chunk.frames, chunk.sound)
        self._metrics.encode_s.observe(time.monotonic() - began)
        self._metrics.av_offset_s.observe(abs(self._writer.offset_s))
        if data:
            await self._sent(self._socket.send_bytes(data))
            self._metrics.sent_bytes.inc(len(data))

    async def close(self, code: int, reason: str) -> None:
        await self._socket.close(code, reason)

    async def _sent(self, sending: Any) -> None:
        """Sends; raises Gone or Closed if the client does not take it."""
        async with self._sending:
            try:
                async with asyncio.timeout(_SLOW_CLIENT_S):
                    await sending
            except TimeoutError:
                message = f"a message was not taken for {_SLOW_CLIENT_S:g} s; the session ends."
                raise Closed("too slow", message) from None
            except WebSocketDisconnect:
                raise Gone from None
            except Exception:
                if self._socket.client_state.name == "CONNECTED":
                    raise
                raise Gone from None

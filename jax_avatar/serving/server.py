"""Server process: runs until a signal, then drains."""

import asyncio
import contextlib
import signal
from types import FrameType

import uvicorn

from jax_avatar.serving.app import drain, make_app
from jax_avatar.serving.server_state import ServerState

__all__ = ["make_config", "serve"]


class _Server(uvicorn.Server):
    """Drains at the first signal, stops at the second."""

    def __init__(self, config: uvicorn.Config, state: ServerState, drain_s: float):
        super().__init__(config)
        self._state, self._drain_s = state, drain_s
        self._draining: asyncio.Task | None = None

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Handles a signal: drains at the first SIGTERM, else stops."""
        if self._draining is not None or sig == signal.SIGINT:
            super().handle_exit(sig, frame)
            return
        self._loop.call_soon_threadsafe(self._begin_to_drain, sig, frame)

    def _begin_to_drain(self, sig: int, frame: FrameType | None) -> None:
        async def drained() -> None:
            await drain(self._state, self._drain_s)
            super(_Server, self).handle_exit(sig, frame)

        self._draining = asyncio.ensure_future(drained())

    async def serve(self, sockets: list | None = None) -> None:
        """Serves, and keeps the event loop for signals."""
        self._loop = asyncio.get_running_loop()
        await super().serve(sockets)


def make_config(state: ServerState, host: str, port: int) -> uvicorn.Config:
    """Settings of the HTTP server."""
    return uvicorn.Config(
        make_app(state),
        host=host,
        port=port,
        ws="websockets-sansio",
        ws_max_size=state.limits.message_bytes,
        ws_ping_interval=10,
        ws_ping_timeout=10,
        timeout_graceful_shutdown=5,
        log_level="warning",
    )


def serve(state: ServerState, host: str, port: int, *, drain_s: float = 30.0) -> None:
    """Serves until SIGTERM, which lets sessions end first, or SIGINT.

    Args:
        state: shared by all connections.
        host: address to listen on.
        port: port to listen on.
        drain_s: seconds that sessions may continue after SIGTERM.
    """
    # uvicorn raises the signal that stopped it again; by then everything is done.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    with contextlib.suppress(KeyboardInterrupt):
        _Server(make_config(state, host, port), state, drain_s).run()

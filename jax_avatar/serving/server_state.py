"""State of a server, shared by its connections."""

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from jax_avatar.dialogue.driver import Parts
from jax_avatar.dialogue.tts import Speak
from jax_avatar.live.session import LiveSession, LiveSettings
from jax_avatar.portraits.view import PortraitView
from jax_avatar.serving.messages import Limits
from jax_avatar.serving.metrics import Metrics
from jax_avatar.serving.pool import SessionPool

__all__ = ["Connection", "ServerState"]


@dataclass(frozen=True, eq=False)
class Connection:
    """A client that has a session.

    Attributes:
        protocol: transport, one of `PROTOCOLS`.
        live: its session.
        warn_of_drain: warns the client that the server stops in so many seconds.
    """

    protocol: str
    live: LiveSession
    warn_of_drain: Callable[[float], Awaitable[None]]


@dataclass
class ServerState:
    """State shared by all connections.

    Attributes:
        pool: compiled sessions.
        portrait: default portrait, `[H W 3]` uint8.
        view: what of a portrait is shown, where the client does not choose.
        token: access token required of clients; empty admits all.
        live: pacing and delay of sessions.
        limits: of clients' messages.
        metrics: Prometheus metrics.
        encode_prompt: prompt -> states; None if the model takes no prompt.
        speak: text -> speech, for clients that type; None without a synthesiser.
        talk: parts of a conversation that the avatar holds by itself; None if clients drive it.
        idle_s: seconds without a message after which a session is ended.
        ice_servers: STUN and TURN servers for WebRTC, as `ice_server` reads them.
        is_marked: True to put the watermark into every frame.
        is_draining: True when the server is about to stop and admits no client.
        connections: clients that have a session.
        tasks: tasks that outlive the request that started them.
    """

    pool: SessionPool
    portrait: np.ndarray
    view: PortraitView = field(default_factory=PortraitView)
    token: str = ""
    live: LiveSettings = field(default_factory=LiveSettings)
    limits: Limits = field(default_factory=Limits)
    metrics: Metrics = field(default_factory=Metrics)
    encode_prompt: Callable[[str], Any] | None = None
    speak: Speak | None = None
    talk: Parts | None = None
    idle_s: float = 300.0
    ice_servers: tuple[str, ...] = ()
    is_marked: bool = True
    is_draining: bool = False
    connections: set[Connection] = field(default_factory=set)
    tasks: set[asyncio.Task] = field(default_factory=set)

    @contextlib.contextmanager
    def connected(self, connection: Connection) -> Iterator[None]:
        """Counts a connection among those that have a session."""
        self.connections.add(connection)
        try:
            yield
        finally:
            self.connections.discard(connection)

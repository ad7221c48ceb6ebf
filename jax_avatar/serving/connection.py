"""One client on a WebSocket: its session, from the first message to the last.

client --text, PCM--> receiver --> LiveSession --> sender --MP4, events--> client
"""

import asyncio
import contextlib
import copy
import hmac
import json
import logging
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from starlette.websockets import WebSocket, WebSocketDisconnect

from jax_avatar.io.fragments import FragmentWriter
from jax_avatar.io.image import decode_image, prepare_reference
from jax_avatar.serving.messages import (
    VERSION,
    ClientMessage,
    Limits,
    ProtocolError,
    read_message,
)
from jax_avatar.serving.metrics import Metrics
from jax_avatar.serving.seats import Seats
from jax_avatar.streaming.live import LiveChunk, LiveSession, LiveSettings
from jax_avatar.streaming.states import State

__all__ = ["Connection", "ServerState"]

_FIRST_MESSAGE_S = 10.0
_SLOW_CLIENT_S = 5.0  # how long a message may wait until it is taken
_STATES = {state.value: state for state in (State.IDLE, State.LISTENING, State.THINKING)}
_log = logging.getLogger(__name__)


@dataclass
class ServerState:
    """What all connections share.

    Attributes:
        seats: sessions that are warm.
        portrait: for clients that bring none, `[H W 3]` uint8.
        token: that every client must know; empty lets everybody in.
        live: pace and delay.
        limits: what clients may send.
        metrics: what is counted.
        encode_prompt: prompt -> states, where the model takes one.
        idle_s: without a message for so long, a session is ended.
        is_draining: no session may begin, since the server is about to stop.
        connections: under way.
    """

    seats: Seats
    portrait: np.ndarray
    token: str = ""
    live: LiveSettings = field(default_factory=LiveSettings)
    limits: Limits = field(default_factory=Limits)
    metrics: Metrics = field(default_factory=Metrics)
    encode_prompt: Callable[[str], Any] | None = None
    idle_s: float = 300.0
    is_draining: bool = False
    connections: set["Connection"] = field(default_factory=set)

    def allows(self, token: str | None) -> bool:
        """Whether a token is the right one."""
        return not self.token or hmac.compare_digest((token or "").encode(), self.token.encode())


class _Closed(Exception):
    """The session is over, for a reason that is no failure."""


class Connection:
    """Serves one client; nothing of it is seen by another."""

    def __init__(self, socket: WebSocket, state: ServerState):
        self._socket, self._state = socket, state
        self._id = secrets.token_hex(8)
        self._errors, self._burst = 0, 0.0
        self._last_message = time.monotonic()
        self._heard_at: float | None = None  # when speech came into silence
        self._rate = 16_000
        self._sending = asyncio.Lock()

    async def run(self) -> None:
        """Returns when the client has gone or has been sent away."""
        state = self._state
        await self._socket.accept()
        reason, code = "client gone", 1000
        try:
            async with asyncio.timeout(_FIRST_MESSAGE_S):
                create = await self._receive()
            if create.type != "session.create":
                raise ProtocolError("bad_message", "the first message must be session.create.")
            await self._serve(create.fields)
        except ProtocolError as error:
            state.metrics.refused.labels(error.code).inc()
            reason, code = error.code, 1008
            with contextlib.suppress(Exception):
                await self._fail(error, is_fatal=True)
        except TimeoutError:
            reason, code = "no session.create", 1008
        except _Closed as closed:
            reason = str(closed)
        except WebSocketDisconnect:
            pass
        except Exception:
            if self._socket_is_open:
                _log.exception("session %s failed", self._id)
                reason, code = "server failure", 1011
        with contextlib.suppress(Exception):
            async with asyncio.timeout(2):
                await self._say("session.closed", reason=reason)
                await self._socket.close(code, reason)

    async def warn_of_drain(self, seconds: float) -> None:
        """Tells the client that the server will stop."""
        with contextlib.suppress(Exception):
            await self._say("draining", seconds=seconds)

    async def _serve(self, wanted: dict[str, Any]) -> None:
        state = self._state
        portrait, text = await self._admit(wanted)
        core = state.seats.take()
        if core is None:
            raise ProtocolError(
                "busy", f"all {state.seats.count} sessions are taken; try again later."
            )
        state.metrics.started.inc()
        state.connections.add(self)
        reason = "failed"
        began = time.monotonic()
        try:
            await state.seats.prepare(core, portrait, text)
            live = LiveSession(
                core,
                state.live,
                encode_prompt=state.encode_prompt,
                dispatch=state.seats.dispatch,
            )
            try:
                async with live:
                    await self._converse(live, began)
            except _Closed as closed:
                reason = str(closed)
                raise
            except WebSocketDisconnect:
                reason = "client gone"
                raise
        finally:
            state.connections.discard(self)
            state.seats.give_back(core)
            state.metrics.ended.labels(reason).inc()

    async def _admit(self, wanted: dict[str, Any]) -> tuple[np.ndarray, Any]:
        """Portrait and prompt states of a client that may come in."""
        state = self._state
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
        self._rate = wanted.get("sample_rate", 16_000)
        if not 8000 <= self._rate <= 96_000:
            raise ProtocolError("bad_message", f"sample_rate {self._rate}; expected 8000 to 96000.")
        image, text = state.portrait, None
        try:
            if "portrait" in wanted:
                if not wanted.get("consent"):
                    raise ProtocolError(
                        "consent", "a portrait needs consent: true, that the person agrees."
                    )
                most = state.limits.portrait_pixels
                image = await asyncio.to_thread(
                    lambda: decode_image(wanted["portrait"], most_pixels=most)
                )
            if wanted.get("prompt"):
                if state.encode_prompt is None:
                    raise ProtocolError("no_prompt", "this model takes no prompt.")
                text = await asyncio.to_thread(state.encode_prompt, wanted["prompt"])
        except ProtocolError:
            raise
        except ValueError as error:
            raise ProtocolError("bad_portrait", str(error)) from None
        height, width = state.seats.size
        return await asyncio.to_thread(prepare_reference, image, height, width, cover=True), text

    async def _converse(self, live: LiveSession, began: float) -> None:
        """Listens and sends until one of them ends."""
        tasks = {
            asyncio.create_task(self._listen(live)),
            asyncio.create_task(self._show(live, began)),
            asyncio.create_task(self._watch_idle()),
        }
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    # ---- in ----------------------------------------------------

    async def _listen(self, live: LiveSession) -> None:
        while True:
            try:
                message = await self._receive()
                await self._obey(live, message)
            except (ProtocolError, ValueError) as error:
                await self._fail(error)

    async def _receive(self) -> ClientMessage:
        """The next message; what cannot be one counts as an error of the client's."""
        received = await self._socket.receive()
        if received["type"] == "websocket.disconnect":
            raise WebSocketDisconnect(received.get("code", 1006))
        now, limits = time.monotonic(), self._state.limits
        forgiven = (now - self._last_message) * limits.messages_per_s
        self._burst = max(0.0, self._burst - forgiven) + 1
        if self._burst > 10 * limits.messages_per_s:
            raise _Closed("too many messages")
        self._last_message = now
        text = received.get("text")
        return read_message(received["bytes"] if text is None else text, limits)

    async def _obey(self, live: LiveSession, message: ClientMessage) -> None:
        fields = message.fields
        if message.type == "audio.append":
            if live.queued_s == 0 and live.state is not State.SPEAKING:
                self._heard_at = time.monotonic()
            live.push_audio(fields["audio"], self._rate)
        elif message.type == "audio.commit":
            live.end_segment()
        elif message.type == "clear":
            await self._say("cleared", position_s=live.clear(), at_s=live.time_s)
        elif message.type == "prompt.update":
            await live.set_prompt(fields["text"])
        elif message.type == "state.update":
            if fields["state"] not in _STATES:
                raise ValueError(f"state {fields['state'][:40]!r}; expected {list(_STATES)}.")
            {"idle": live.idle, "listening": live.listen, "thinking": live.think}[fields["state"]]()
        elif message.type == "close":
            raise _Closed("closed by the client")
        else:
            raise ProtocolError("bad_message", "there is a session already.")

    async def _watch_idle(self) -> None:
        while (left := self._last_message + self._state.idle_s - time.monotonic()) > 0:
            await asyncio.sleep(left)
        raise _Closed("idle")

    # ---- out ---------------------------------------------------

    async def _show(self, live: LiveSession, began: float) -> None:
        state, fps = self._state, live.core.model.settings.fps
        height, width = state.seats.size
        rate = live.core.speech.sample_rate
        writer = FragmentWriter(width, height, fps, rate)
        await self._say(
            "session.created",
            version=VERSION, session=self._id, mime=writer.mime, width=width, height=height,
            fps=fps, delay_s=writer.delay_s, model=live.core.model.name,
            takes_prompt=state.encode_prompt is not None,
        )  # fmt: skip
        before, told_at = copy.copy(live.stats), time.monotonic()
        async for chunk in live:
            await self._tell_events(chunk)
            encoding = time.monotonic()
            data = await asyncio.to_thread(writer.write, chunk.frames, chunk.sound)
            now = time.monotonic()
            state.metrics.encode_s.observe(now - encoding)
            if data:
                await self._send(self._socket.send_bytes(data))
                state.metrics.sent_bytes.inc(len(data))
            if not before.frames:
                state.metrics.first_frame_s.observe(now - began)
            state.metrics.add(before, live.stats)
            before = copy.copy(live.stats)
            if now - told_at >= 1:
                told_at = now
                await self._say(
                    "stats",
                    at_s=live.time_s, queued_s=live.queued_s, block_s=live.stats.step_s,
                    late_s=live.stats.late_s, dropped=live.stats.dropped,
                )  # fmt: skip

    async def _tell_events(self, chunk: LiveChunk) -> None:
        for event in chunk.events:
            if event.name == "playback_started" and self._heard_at is not None:
                self._state.metrics.reaction_s.observe(time.monotonic() - self._heard_at)
                self._heard_at = None
            await self._say(event.name, at_s=event.at_s, **event.data)

    async def _fail(self, error: ValueError, *, is_fatal: bool = False) -> None:
        code = getattr(error, "code", "refused")
        self._state.metrics.errors.labels(code).inc()
        self._errors += 1
        await self._say("error", code=code, message=str(error), fatal=is_fatal)
        if self._errors >= self._state.limits.errors:
            raise _Closed("too many errors")

    async def _say(self, kind: str, **fields: Any) -> None:
        await self._send(self._socket.send_text(json.dumps({"type": kind, **fields})))

    async def _send(self, sending: Any) -> None:
        """Sends, unless the client does not take it."""
        async with self._sending:
            try:
                async with asyncio.timeout(_SLOW_CLIENT_S):
                    await sending
            except TimeoutError:
                raise _Closed("too slow") from None

    @property
    def _socket_is_open(self) -> bool:
        return self._socket.client_state.name == "CONNECTED"

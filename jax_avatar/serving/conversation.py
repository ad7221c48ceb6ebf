"""One client and its session, from the first message to the last, over any transport.

client --messages--> Link --> Conversation --> LiveSession --> Conversation --chunks, events--> Link
"""

import abc
import asyncio
import contextlib
import dataclasses
import json
import logging
import secrets
import time
from typing import Any

import numpy as np

from jax_avatar.io.watermark import mark
from jax_avatar.live.session import LiveChunk, LiveSession
from jax_avatar.live.turn import State
from jax_avatar.live.workers import Workers
from jax_avatar.portraits.view import ShownPortrait
from jax_avatar.serving.access import admit
from jax_avatar.serving.messages import (
    VERSION,
    AudioAppend,
    AudioCommit,
    Clear,
    Close,
    Message,
    PromptUpdate,
    ProtocolError,
    SessionCreate,
    SpeechCreate,
    StateUpdate,
    UserAppend,
    UserCommit,
    UserText,
    read_message,
)
from jax_avatar.serving.server_state import Connection, ServerState
from jax_avatar.serving.talk import Talk
from jax_avatar.serving.tasks import until_first_ends
from jax_avatar.streaming.decode import NotFinite

__all__ = ["Closed", "Conversation", "Gone", "Incoming", "Link", "MicrophoneAudio"]

_TEXTS = 4  # most that wait for the synthesiser
_STATES = {"idle": LiveSession.idle, "listening": LiveSession.listen, "thinking": LiveSession.think}
_log = logging.getLogger(__name__)


class Gone(Exception):
    """The client has left."""

    def __init__(self):
        super().__init__("client gone")


class Closed(Exception):
    """The session is over, without a failure.

    Attributes:
        error: sent to the client first if it reached a limit; None if it ended the session.
    """

    def __init__(self, reason: str, message: str = ""):
        super().__init__(reason)
        code = reason.replace(" ", "_")
        self.error = ProtocolError(code, message) if message else None


@dataclasses.dataclass(frozen=True)
class MicrophoneAudio:
    """Speech from a media track of the link, mono samples in [-1, 1]."""

    samples: np.ndarray
    sample_rate: int


Incoming = str | bytes | Message | MicrophoneAudio
"""Raw message of the client, or one of the link's own, to which no rate limit applies."""


class Link(abc.ABC):
    """Transport of messages and video of one client.

    Attributes:
        protocol: its name, one of `PROTOCOLS`.
    """

    protocol: str

    @abc.abstractmethod
    def check(self, create: SessionCreate) -> None:
        """Raises ProtocolError if a field is not for this link."""

    @abc.abstractmethod
    async def open(self, live: LiveSession, size: tuple[int, int]) -> dict[str, Any]:
        """Prepares for video of that height and width; returns its fields of `session.created`."""

    @abc.abstractmethod
    async def receive(self) -> Incoming:
        """The next message."""

    @abc.abstractmethod
    async def send(self, text: str) -> None:
        """Sends a message; raises Gone or Closed if the client does not take it."""

    @abc.abstractmethod
    async def show(self, chunk: LiveChunk) -> None:
        """Sends picture and sound, as `send`."""

    @abc.abstractmethod
    async def close(self, code: int, reason: str) -> None:
        """Ends the connection, with a WebSocket close code."""


class Conversation:
    """Serves one client; others see nothing of it."""

    def __init__(self, link: Link, state: ServerState):
        self._link, self._state = link, state
        self._id = secrets.token_hex(8)
        self._errors, self._burst = 0, 0.0
        self._last_message = time.monotonic()
        self._heard_at: float | None = None  # arrival of speech after silence
        self._rate = 16_000
        self._texts: asyncio.Queue[str] = asyncio.Queue(_TEXTS)  # for the synthesiser
        self._num_cleared = 0
        self._talk: Talk | None = None  # the conversation, if the avatar holds it

    async def run(self) -> None:
        """Serves until the client leaves or is disconnected."""
        state = self._state
        reason, code, last = "client gone", 1000, None
        limit_s = state.limits.first_message_s
        try:
            async with asyncio.timeout(limit_s):
                create = await self._receive()
            if not isinstance(create, SessionCreate):
                raise ProtocolError("bad_message", "the first message must be session.create.")
            await self._serve(create)
        except ProtocolError as error:
            state.metrics.refused.labels(error.code).inc()
            reason, code = error.code, 1008
            with contextlib.suppress(Exception):
                await self._fail(error, is_fatal=True)
        except TimeoutError:
            reason, code = "no session.create", 1008
            last = ProtocolError("timeout", f"no session.create within {limit_s:g} s.")
        except Closed as closed:
            reason, last = str(closed), closed.error
        except Gone:
            pass
        except asyncio.CancelledError:
            reason, code = "server stopped", 1001
            raise
        except NotFinite as error:
            _log.error("session %s: %s", self._id, error)
            reason, code = "server failure", 1011
            last = ProtocolError("server_failure", "the model's output is not finite.")
        except Exception:
            _log.exception("session %s failed", self._id)
            reason, code = "server failure", 1011
            last = ProtocolError("server_failure", "the server failed; start another session.")
        finally:
            with contextlib.suppress(Exception):
                async with asyncio.timeout(2):
                    if last:
                        await self._fail(last, is_fatal=True)
                    await self._send("session.closed", reason=reason)
            with contextlib.suppress(Exception):
                async with asyncio.timeout(5):
                    await self._link.close(code, reason)

    async def _warn_of_drain(self, seconds: float) -> None:
        with contextlib.suppress(Exception):
            await self._send("draining", seconds=seconds)

    async def _serve(self, create: SessionCreate) -> None:
        """Serves an admitted client with a session of the pool."""
        state = self._state
        portrait, text = await admit(state, create)
        self._link.check(create)
        self._rate = create.sample_rate or self._rate
        session = state.pool.take()
        if session is None:
            raise ProtocolError(
                "busy", f"all {state.pool.count} sessions are taken; try again later."
            )
        state.metrics.started.labels(self._link.protocol).inc()
        reason, began = "failed", time.monotonic()
        try:
            live = LiveSession(
                session,
                state.live,
                encode_prompt=state.encode_prompt,
                workers=Workers(state.pool.dispatch),
            )
            with state.connected(Connection(self._link.protocol, live, self._warn_of_drain)):
                await state.pool.prepare(session, portrait.reference, text)
                async with live:
                    await self._converse(live, began, portrait)
        except (Closed, Gone) as end:
            reason = str(end)
            raise
        except ProtocolError as error:
            reason = error.code
            raise
        finally:
            state.pool.give_back(session)
            state.metrics.ended.labels(reason).inc()

    async def _converse(self, live: LiveSession, began: float, portrait: ShownPortrait) -> None:
        """Receives and sends until one of them ends."""
        height, width = portrait.size
        if parts := self._state.talk:
            takes_prompt = self._state.encode_prompt is not None
            metrics = self._state.metrics.turns
            self._talk = Talk(live, parts, self._rate, metrics, takes_prompt=takes_prompt)
        described = await self._link.open(live, (height, width))
        form = live.session.format
        await self._send(
            "session.created",
            version=VERSION, session=self._id, width=width, height=height,
            fps=form.fps, model=live.session.model.name,
            takes_prompt=self._state.encode_prompt is not None,
            takes_text=self._state.speak is not None, talks=self._talk is not None,
            listens=self._talk is not None and self._talk.listens,
            warnings=list(portrait.remarks), **described,
        )  # fmt: skip
        await until_first_ends(
            *(self._talk.run(self._send) if self._talk else ()),
            self._listen(live),
            self._show(live, began, portrait),
            self._speak(live),
            self._watch_idle(),
        )

    # ---- in ----------------------------------------------------

    async def _listen(self, live: LiveSession) -> None:
        while True:
            try:
                message = await self._receive()
                await self._handle(live, message)
            except (ProtocolError, ValueError) as error:
                await self._fail(error)

    async def _receive(self) -> Message | MicrophoneAudio:
        """The next valid message; an invalid one counts as an error of the client's."""
        received = await self._link.receive()
        now, limits = time.monotonic(), self._state.limits
        if not isinstance(received, str | bytes):
            self._last_message = now
            return received
        forgiven = (now - self._last_message) * limits.messages_per_s
        self._burst = max(0.0, self._burst - forgiven) + 1
        if self._burst > 10 * limits.messages_per_s:
            most = f"at most {limits.messages_per_s:g} messages a second, over ten seconds."
            raise Closed("too many messages", most)
        self._last_message = now
        return read_message(received, limits)

    async def _handle(self, live: LiveSession, message: Message | MicrophoneAudio) -> None:
        if self._talk and self._talk.handle(message):
            return
        match message:
            case MicrophoneAudio(samples=samples, sample_rate=rate) if self._talk:
                self._talk.hear(samples, rate)
            case AudioAppend(audio=pcm):
                self._hear(live, pcm, self._rate)
            case MicrophoneAudio(samples=samples, sample_rate=rate):
                self._hear(live, samples, rate)
            case AudioCommit():
                live.end_segment()
            case SpeechCreate(text=text):
                self._queue_text(text)
            case Clear():
                self._num_cleared += 1
                while not self._texts.empty():
                    self._texts.get_nowait()
                await self._send("cleared", position_s=live.clear(), at_s=live.time_s)
                if self._talk:
                    self._talk.clear()
            case PromptUpdate(text=text):
                await live.set_prompt(text)
            case StateUpdate(state=state):
                if state not in _STATES:
                    raise ValueError(f"state {state[:40]!r}; expected {list(_STATES)}.")
                _STATES[state](live)
            case UserAppend() | UserCommit() | UserText():
                raise ProtocolError("refused", "this server holds no conversation; see --talk.")
            case Close():
                raise Closed("closed by the client")
            case _:
                raise ProtocolError("bad_message", "there is a session already.")

    def _hear(self, live: LiveSession, pcm: np.ndarray | bytes, rate: int) -> None:
        if live.queued_s == 0 and live.state is not State.SPEAKING:
            self._heard_at = time.monotonic()
        live.push_audio(pcm, rate)

    def _queue_text(self, text: str) -> None:
        if self._state.speak is None:
            raise ProtocolError(
                "no_speech",
                'this server cannot speak text; on its machine: pip install ".[talk]", or '
                "apt-get install flite.",
            )
        try:
            self._texts.put_nowait(text)
        except asyncio.QueueFull:
            raise ValueError(f"{_TEXTS} texts wait already; send this one later.") from None

    async def _speak(self, live: LiveSession) -> None:
        """Synthesises texts, one after the other, beside everything else."""
        while True:
            text, before = await self._texts.get(), self._num_cleared
            try:
                samples, rate = await asyncio.to_thread(self._state.speak, text)
                if before == self._num_cleared:  # not interrupted meanwhile
                    self._hear(live, samples, rate)
                    live.end_segment()
            except ValueError as error:
                await self._fail(error)
            except (Gone, Closed):
                raise
            except Exception:
                _log.exception("session %s: a text could not be spoken", self._id)
                await self._fail(ProtocolError("refused", "this text could not be spoken."))

    async def _watch_idle(self) -> None:
        while (left := self._last_message + self._state.idle_s - time.monotonic()) > 0:
            await asyncio.sleep(left)
        raise Closed("idle", f"no message for {self._state.idle_s:g} s; the session ends.")

    # ---- out ---------------------------------------------------

    async def _show(self, live: LiveSession, began: float, portrait: ShownPortrait) -> None:
        metrics = self._state.metrics
        before, reported_at = live.stats, time.monotonic()
        async for chunk in live:
            if self._talk:
                self._talk.show(chunk)
            await self._send_events(chunk)
            frames = await asyncio.to_thread(self._finished, chunk.frames, portrait)
            await self._link.show(dataclasses.replace(chunk, frames=frames))
            now = time.monotonic()
            if not before.frames:
                metrics.first_frame_s.observe(now - began)
            metrics.add(before, live.stats)
            before = live.stats
            if now - reported_at >= 1:
                reported_at = now
                await self._send(
                    "stats",
                    at_s=live.time_s, queued_s=live.queued_s, block_s=live.stats.step_s,
                    late_s=live.stats.late_s, dropped=live.stats.dropped,
                )  # fmt: skip

    def _finished(self, frames: np.ndarray, portrait: ShownPortrait) -> np.ndarray:
        shown = portrait.show(frames)
        return mark(shown) if self._state.is_marked else shown

    async def _send_events(self, chunk: LiveChunk) -> None:
        for event in chunk.events:
            if event.name == "playback_started" and self._heard_at is not None:
                self._state.metrics.reaction_s.observe(time.monotonic() - self._heard_at)
                self._heard_at = None
            await self._send(event.name, at_s=event.at_s, **event.data)

    async def _fail(self, error: ValueError, *, is_fatal: bool = False) -> None:
        """Sends an error; ends the session after too many."""
        code = getattr(error, "code", "refused")
        self._state.metrics.errors.labels(code).inc()
        self._errors += 1
        await self._send("error", code=code, message=str(error), fatal=is_fatal)
        if self._errors >= self._state.limits.errors and not is_fatal:
            raise Closed("too many errors", f"{self._errors} bad messages; the session ends.")

    async def _send(self, kind: str, **fields: Any) -> None:
        await self._link.send(json.dumps({"type": kind, **fields}))

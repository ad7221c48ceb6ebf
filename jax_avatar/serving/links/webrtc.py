"""Client on WebRTC: messages on a data channel, its voice and the avatar on media tracks.

POST offer --> answer; then   microphone --SpeechGate--> messages --> Conversation
                              chunks --ChunkPlayer--> picture and sound, on one clock
"""

import asyncio
import contextlib
import json
import logging
import time
from typing import Any

from aiortc import (
    MediaStreamTrack,
    RTCBundlePolicy,
    RTCConfiguration,
    RTCDataChannel,
    RTCIceServer,
    RTCPeerConnection,
    RTCSessionDescription,
)
from aiortc.exceptions import InvalidStateError
from aiortc.mediastreams import MediaStreamError
from aiortc.rtcicetransport import parse_stun_turn_uri
from aiortc.sdp import SessionDescription

from jax_avatar.io.mixing import Mixer
from jax_avatar.live.session import LiveChunk, LiveSession
from jax_avatar.live.speech_gate import SpeechGate
from jax_avatar.serving.conversation import (
    Closed,
    Conversation,
    Gone,
    Incoming,
    Link,
    MicrophoneAudio,
)
from jax_avatar.serving.links.webrtc_tracks import SOUND_RATE, ChunkPlayer
from jax_avatar.serving.messages import AudioCommit, ProtocolError, SessionCreate
from jax_avatar.serving.server_state import ServerState

__all__ = ["ice_server", "serve_offer"]

_log = logging.getLogger(__name__)
_MOST_MESSAGES = 1000  # received and not yet handled
_MOST_BUFFERED = 256_000  # bytes sent and not yet taken
_MOST_CANDIDATES = 100
_STATUS = {"unauthorised": 401, "too_large": 413, "busy": 503, "starting": 503, "draining": 503}


def ice_server(url: str) -> RTCIceServer:
    """STUN or TURN server of a URL: `stun:HOST:PORT` or `turn:USER:PASSWORD@HOST:PORT`.

    Raises:
        ValueError: the URL is neither.
    """
    kind, _, rest = url.partition(":")
    login, _, address = rest.rpartition("@")
    user, _, password = login.partition(":")
    try:
        parse_stun_turn_uri(f"{kind}:{address}")
        if bool(user and password) != (kind in ("turn", "turns")):
            raise ValueError
    except ValueError:
        raise ValueError(
            f"ICE server {url!r}; expected stun:HOST:PORT or turn:USER:PASSWORD@HOST:PORT."
        ) from None
    return RTCIceServer(f"{kind}:{address}", user or None, password or None)


async def serve_offer(body: str, state: ServerState) -> tuple[int, dict[str, Any]]:
    """Starts a session that outlives this call.

    Args:
        body: `session.create` with an `sdp`.
        state: of the server.

    Returns:
        HTTP status, and an answer `{"type": "answer", "sdp": ...}` or an error.
    """
    link = _RtcLink(body, state)
    serving = asyncio.create_task(Conversation(link, state).run())
    state.tasks.add(serving)
    serving.add_done_callback(state.tasks.discard)
    serving.add_done_callback(lambda _: link.answer_with(503, {"type": "session.closed"}))
    return await link.answer


class _RtcLink(Link):
    protocol = "webrtc"

    def __init__(self, body: str, state: ServerState):
        self._state = state
        self._messages: asyncio.Queue[Incoming | None] = asyncio.Queue(_MOST_MESSAGES)
        self._messages.put_nowait(body)
        self.answer: asyncio.Future[tuple[int, dict]] = asyncio.get_running_loop().create_future()
        self._offer = ""
        self._peer: RTCPeerConnection | None = None
        self._channel: RTCDataChannel | None = None
        self._opened = asyncio.Event()
        self._close_reason: Exception | None = None
        self._is_slow = False
        self._player: ChunkPlayer | None = None
        self._tasks: list[asyncio.Task] = []

    def answer_with(self, status: int, content: dict[str, Any]) -> None:
        """Answers the request, unless it has been answered."""
        if not self.answer.done():
            self.answer.set_result((status, content))

    # ---- methods of `Link` -------------------------------------

    def check(self, create: SessionCreate) -> None:
        # mDNS candidates (.local) cannot be resolved here; ICE learns the peer's address from its
        # own checks.
        lines = (create.sdp or "").splitlines()
        self._offer = "".join(f"{line}\r\n" for line in lines if ".local " not in line)
        try:
            media = SessionDescription.parse(self._offer).media
        except Exception:  # aiortc's parser raises exceptions of many types
            raise ProtocolError("bad_message", "sdp is not a readable offer.") from None
        kinds = sorted(part.kind for part in media)
        if kinds != ["application", "audio", "video"]:
            raise ProtocolError(
                "bad_message",
                f"sdp offers {kinds}; expected one audio, one video and one data channel.",
            )
        if sum(len(part.ice_candidates) for part in media) > _MOST_CANDIDATES:
            raise ProtocolError("bad_message", f"sdp has over {_MOST_CANDIDATES} candidates.")

    async def open(self, live: LiveSession, size: tuple[int, int]) -> dict[str, Any]:
        self._player = ChunkPlayer(live.session.format)
        servers = [ice_server(url) for url in self._state.ice_servers]
        self._peer = peer = RTCPeerConnection(
            RTCConfiguration(servers, bundlePolicy=RTCBundlePolicy.MAX_BUNDLE)
        )
        peer.on("datachannel", self._take_channel)
        peer.on("connectionstatechange", self._note_state)
        peer.on("track", self._take_track)
        peer.addTransceiver(self._player.sound, "sendrecv")
        peer.addTransceiver(self._player.picture, "sendonly")
        try:
            await peer.setRemoteDescription(RTCSessionDescription(self._offer, "offer"))
            await peer.setLocalDescription(await peer.createAnswer())
        except Exception as error:
            raise ProtocolError("bad_message", f"sdp cannot be answered: {error}") from None
        self.answer_with(200, {"type": "answer", "sdp": peer.localDescription.sdp})
        limit_s = self._state.limits.connect_s
        try:
            async with asyncio.timeout(limit_s):
                await self._opened.wait()
        except TimeoutError:
            message = f"no connection within {limit_s:g} s of the answer."
            raise Closed("no connection", message) from None
        self._tasks.append(asyncio.create_task(self._watch()))
        return {"delay_s": 0.0}

    async def receive(self) -> Incoming:
        message = await self._messages.get()
        if message is None:
            raise self._close_reason
        return message

    async def send(self, text: str) -> None:
        if self._channel is None:
            content = json.loads(text)
            if content["type"] in ("error", "session.closed"):
                known = 400 if content["type"] == "error" else 500
                self.answer_with(_STATUS.get(content.get("code"), known), content)
            return
        if self._channel.bufferedAmount > _MOST_BUFFERED and not self._is_slow:
            self._is_slow = True  # the error itself is still sent
            raise Closed("too slow", f"{_MOST_BUFFERED} bytes wait to be taken; the session ends.")
        try:
            self._channel.send(text)
        except (InvalidStateError, ConnectionError):
            raise Gone from None

    async def show(self, chunk: LiveChunk) -> None:
        self._player.play(chunk)

    async def close(self, code: int, reason: str) -> None:
        for task in self._tasks:
            task.cancel()
        if self._peer is None:
            return
        try:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(1):
                    channel = self._channel
                    while self._close_reason is None and channel and channel.bufferedAmount:
                        await asyncio.sleep(0.02)
        finally:
            await self._peer.close()

    # ---- callbacks of the peer ---------------------------------

    def _finish(self, reason: Exception) -> None:
        """Ends the session; messages not yet handled are dropped."""
        if self._close_reason is None:
            self._close_reason = reason
            while not self._messages.empty():
                self._messages.get_nowait()
            self._messages.put_nowait(None)
            self._opened.set()

    def _note_state(self) -> None:
        if self._peer.connectionState in ("failed", "closed"):
            self._finish(Gone())

    def _take_channel(self, channel: RTCDataChannel) -> None:
        if self._channel is not None:
            channel.close()
            return
        self._channel = channel
        channel.on("message", self._take_message)
        channel.on("close", lambda: self._finish(Gone()))
        self._opened.set()

    def _take_message(self, message: str | bytes) -> None:
        if self._close_reason is not None:
            return
        try:
            self._messages.put_nowait(message)
        except asyncio.QueueFull:
            message = f"{_MOST_MESSAGES} messages wait to be read; the session ends."
            self._finish(Closed("too many messages", message))

    def _take_track(self, track: MediaStreamTrack) -> None:
        if track.kind == "audio":
            self._tasks.append(asyncio.create_task(self._listen(track)))

    async def _listen(self, track: MediaStreamTrack) -> None:
        """Turns utterances of the microphone into messages."""
        began, heard_s, gate = time.monotonic(), 0.0, SpeechGate(SOUND_RATE)
        mixer = Mixer("a microphone", _log.warning)
        while True:
            try:
                frame = await track.recv()
            except MediaStreamError:
                return
            heard_s += frame.samples / frame.sample_rate
            if heard_s > 10 + 1.5 * (time.monotonic() - began):
                message = "the microphone sends more sound than time passes; the session ends."
                self._finish(Closed("more audio than time", message))
                return
            if frame.sample_rate != gate.rate:
                gate = SpeechGate(frame.sample_rate)
            for piece in gate(mixer.frame(frame)):
                if self._close_reason is not None:
                    return
                await self._messages.put(
                    AudioCommit() if piece is None else MicrophoneAudio(piece, gate.rate)
                )

    async def _watch(self) -> None:
        """Detects a peer that sends no packets, not even reports; counts bytes sent."""
        packets, sent, heard_at = -1, 0, time.monotonic()
        while time.monotonic() - heard_at < self._state.limits.vanished_s:
            report = list((await self._peer.getStats()).values())
            received = sum(part.packetsReceived for part in report if part.type == "transport")
            if received != packets:
                packets, heard_at = received, time.monotonic()
            total = sum(part.bytesSent for part in report if part.type == "outbound-rtp")
            self._state.metrics.sent_bytes.inc(total - sent)
            sent = total
            await asyncio.sleep(1)
        self._finish(Gone())

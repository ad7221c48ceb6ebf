"""A client on WebRTC: messages on a data channel, its voice and the avatar on media tracks.

POST offer --> answer; then   microphone --SpeechGate--> messages --> Conversation
                              chunks --_Player--> picture and sound, on one clock
"""

import asyncio
import contextlib
import json
import logging
import time
from fractions import Fraction
from typing import Any

import av
import numpy as np
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

from jax_avatar.io.audio import LowLatencyResampler
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
from jax_avatar.serving.messages import AudioCommit, ProtocolError, SessionCreate
from jax_avatar.serving.server_state import ServerState
from jax_avatar.streaming.format import StreamFormat
from jax_avatar.streaming.sample_queue import SampleQueue

__all__ = ["ice_server", "serve_offer"]

_log = logging.getLogger(__name__)
_CONNECT_S = 10.0  # from the answer until the data channel is there
_VANISHED_S = 15.0  # without a packet, a report included, nobody is there
_DELAY_S = 0.04  # so that a piece of sound is whole when its time comes
_MOST_MESSAGES, _MOST_BUFFERED = 1000, 256_000  # waiting to be read; bytes waiting to be taken
_MOST_CANDIDATES = 100
_SOUND_RATE, _PIECE = 48_000, 960  # Opus, 20 ms
_VIDEO_CLOCK = 90_000
_STATUS = {"unauthorised": 401, "too_large": 413, "busy": 503, "starting": 503, "draining": 503}


def ice_server(url: str) -> RTCIceServer:
    """A server that helps to find a way: `stun:HOST:PORT` or `turn:USER:PASSWORD@HOST:PORT`.

    Raises:
        ValueError: it is neither.
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
    """Begins a session; returns when there is an answer, and serves on.

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
        self._player: _Player | None = None
        self._tasks: list[asyncio.Task] = []

    def answer_with(self, status: int, content: dict[str, Any]) -> None:
        """Answers the request, unless that was done."""
        if not self.answer.done():
            self.answer.set_result((status, content))

    # ---- as of any link ----------------------------------------

    def check(self, create: SessionCreate) -> None:
        # mDNS candidates (.local) cannot be resolved here; ICE learns the peer's address from its
        # own checks.
        lines = (create.sdp or "").splitlines()
        self._offer = "".join(f"{line}\r\n" for line in lines if ".local " not in line)
        try:
            media = SessionDescription.parse(self._offer).media
        except Exception:  # aiortc's reader raises nearly anything
            raise ProtocolError("bad_message", "sdp is no offer that can be read.") from None
        kinds = sorted(part.kind for part in media)
        if kinds != ["application", "audio", "video"]:
            raise ProtocolError(
                "bad_message",
                f"sdp offers {kinds}; expected one audio, one video and one data channel.",
            )
        if sum(len(part.ice_candidates) for part in media) > _MOST_CANDIDATES:
            raise ProtocolError("bad_message", f"sdp has over {_MOST_CANDIDATES} candidates.")

    async def open(self, live: LiveSession) -> dict[str, Any]:
        self._player = _Player(live.session.format)
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
        try:
            async with asyncio.timeout(_CONNECT_S):
                await self._opened.wait()
        except TimeoutError:
            told = f"no connection within {_CONNECT_S:g} s of the answer."
            raise Closed("no connection", told) from None
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
            self._is_slow = True  # and is told so
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

    # ---- what the peer does ------------------------------------

    def _finish(self, why: Exception) -> None:
        """Notifies the receiver at once."""
        if self._close_reason is None:
            self._close_reason = why
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
            told = f"{_MOST_MESSAGES} messages wait to be read; the session ends."
            self._finish(Closed("too many messages", told))

    def _take_track(self, track: MediaStreamTrack) -> None:
        if track.kind == "audio":
            self._tasks.append(asyncio.create_task(self._listen(track)))

    async def _listen(self, track: MediaStreamTrack) -> None:
        """The microphone: what is said in it becomes messages."""
        began, heard_s, gate = time.monotonic(), 0.0, SpeechGate(_SOUND_RATE)
        mixer = Mixer("a microphone", _log.warning)
        while True:
            try:
                frame = await track.recv()
            except MediaStreamError:
                return
            heard_s += frame.samples / frame.sample_rate
            if heard_s > 10 + 1.5 * (time.monotonic() - began):
                told = "the microphone sends more sound than time passes; the session ends."
                self._finish(Closed("more audio than time", told))
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
        """Notices a peer that has vanished without a word; counts what was sent."""
        packets, sent, heard_at = -1, 0, time.monotonic()
        while time.monotonic() - heard_at < _VANISHED_S:
            report = list((await self._peer.getStats()).values())
            received = sum(part.packetsReceived for part in report if part.type == "transport")
            if received != packets:
                packets, heard_at = received, time.monotonic()
            total = sum(part.bytesSent for part in report if part.type == "outbound-rtp")
            self._state.metrics.sent_bytes.inc(total - sent)
            sent = total
            await asyncio.sleep(1)
        self._finish(Gone())


class _Track(MediaStreamTrack):
    """Frames, each of which leaves when its time has come."""

    def __init__(self, kind: str, most: int):
        super().__init__()
        self.kind = kind
        self._frames: asyncio.Queue[tuple[float, Any]] = asyncio.Queue(most)

    def put(self, due: float, frame: Any) -> None:
        """Adds a frame; where too many wait, the oldest is dropped."""
        if self._frames.full():
            self._frames.get_nowait()
        self._frames.put_nowait((due, frame))

    async def recv(self) -> Any:
        due, frame = await self._frames.get()
        await asyncio.sleep(max(0.0, due - time.monotonic()))
        return frame


class _Player:
    """Cuts chunks into frames and pieces of sound, stamped by the clock of the video.

    A receiver pairs picture and sound by when they were sent, too: each leaves at its own time,
    not with its chunk.
    """

    def __init__(self, form: StreamFormat):
        self.picture, self.sound = _Track("video", 2 * form.fps), _Track("audio", 100)
        self._fps, self._rate = form.fps, form.sample_rate
        self._resample, self._waiting = LowLatencyResampler(_SOUND_RATE), SampleQueue()
        self._frames = self._samples = 0

    def play(self, chunk: LiveChunk) -> None:
        """Puts a chunk that is due now on the tracks."""
        start = time.monotonic() + _DELAY_S - chunk.start_s
        for pixels in chunk.frames:
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
            frame.pts = round(self._frames * _VIDEO_CLOCK / self._fps)
            frame.time_base = Fraction(1, _VIDEO_CLOCK)
            self.picture.put(start + self._frames / self._fps, frame)
            self._frames += 1
        self._waiting.append(self._resample(chunk.sound, self._rate))
        while len(self._waiting) >= _PIECE:
            samples = (np.clip(self._waiting.take(_PIECE), -1, 1) * 32767).astype(np.int16)
            piece = av.AudioFrame.from_ndarray(samples[None], format="s16", layout="mono")
            piece.sample_rate = _SOUND_RATE
            piece.pts, piece.time_base = self._samples, Fraction(1, _SOUND_RATE)
            self.sound.put(start + self._samples / _SOUND_RATE, piece)
            self._samples += _PIECE

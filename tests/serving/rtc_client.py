"""WebRTC client of a live server for tests: a real peer in this process."""

import asyncio
import json
import time
import urllib.error
import urllib.request
from fractions import Fraction

import av
import numpy as np
from aiortc import MediaStreamTrack, RTCPeerConnection, RTCSessionDescription
from aiortc.mediastreams import MediaStreamError
from aiortc.rtcconfiguration import RTCConfiguration

from tests.serving.test_server import TOKEN

RATE = 48_000


class Microphone(MediaStreamTrack):
    """Silence in real time, interrupted by the samples in `speech` (48 kHz)."""

    kind = "audio"

    def __init__(self):
        super().__init__()
        self.speech, self._pts, self._began = np.zeros(0, np.float32), 0, time.monotonic()

    async def recv(self):
        await asyncio.sleep(max(0, self._began + self._pts / RATE - time.monotonic()))
        piece, self.speech = self.speech[:960], self.speech[960:]
        samples = np.pad(piece, (0, 960 - len(piece)))
        frame = av.AudioFrame.from_ndarray((samples * 32767).astype(np.int16)[None], "s16", "mono")
        frame.sample_rate, frame.pts, frame.time_base = RATE, self._pts, Fraction(1, RATE)
        self._pts += 960
        return frame


class Peer:
    """Peer that keeps all events, frames and sound, with their times."""

    def __init__(self, port):
        self.port, self.events, self.answer = port, [], None
        self.frames, self.times, self.sound = [], [], []
        self.microphone = Microphone()
        self._news = asyncio.Event()
        self._tasks = []
        self.connection = RTCPeerConnection(RTCConfiguration(iceServers=[]))
        self.connection.addTrack(self.microphone)
        self.connection.addTransceiver("video", "recvonly")
        self.channel = self.connection.createDataChannel("avatar")
        self.channel.on("message", self._hear)
        self.connection.on("track", lambda t: self._tasks.append(asyncio.create_task(self._see(t))))

    async def __aenter__(self):
        return self

    async def __aexit__(self, *exception):
        for task in self._tasks:
            task.cancel()
        await self.connection.close()

    async def offer(self, **fields):
        """Sends the offer; returns status and answer."""
        await self.connection.setLocalDescription(await self.connection.createOffer())
        fields = {
            "version": 1,
            "token": TOKEN,
            "sdp": self.connection.localDescription.sdp,
        } | fields
        status, self.answer = await asyncio.to_thread(post, self.port, "session.create", **fields)
        if status == 200:
            await self.connection.setRemoteDescription(RTCSessionDescription(**self._as_sdp()))
        return status, self.answer

    def _as_sdp(self):
        return {"sdp": self.answer["sdp"], "type": self.answer["type"]}

    def send(self, kind, **fields):
        self.channel.send(json.dumps({"type": kind, **fields}))

    def speak(self, samples):
        """Sends samples at 16 kHz, as fast as possible."""
        for start in range(0, len(samples), 8000):
            self.channel.send((samples[start : start + 8000] * 32767).astype("<i2").tobytes())

    async def until(self, kind, limit_s=90.0):
        """Waits for the next event of a kind."""
        seen = 0
        async with asyncio.timeout(limit_s):
            while True:
                for event in self.events[seen:]:
                    if event["type"] == kind and not event.get("is_read"):
                        event["is_read"] = True
                        return event
                seen = len(self.events)
                self._news.clear()
                await self._news.wait()

    async def hears(self, at_s, limit_s=90.0):
        """Waits for the sound of a moment of the video."""
        async with asyncio.timeout(limit_s):
            while not self.sound or self.sound[-1][0] < at_s:
                await asyncio.sleep(0.05)

    def _hear(self, message):
        self.events.append(json.loads(message))
        self._news.set()

    async def _see(self, track):
        while True:
            try:
                frame = await track.recv()
            except MediaStreamError:
                return
            if track.kind == "video":
                self.frames.append(frame.to_ndarray(format="rgb24"))
                self.times.append(float(frame.time))
            else:
                samples = frame.to_ndarray().reshape(-1, 2).mean(1) / 32768
                self.sound.append((float(frame.time), samples))

    @property
    def loud_s(self):
        """Seconds of the sound track that are not silent."""
        return np.concatenate(
            [at + np.flatnonzero(np.abs(samples) > 0.02) / RATE for at, samples in self.sound]
        )


def post(port, kind, **fields):
    """Status and answer of a POST to the server's WebRTC endpoint."""
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/v1/rtc",
        data=json.dumps({"type": kind, **fields}).encode(),
        headers={"Content-Type": "application/json"},
    )
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)

"""Client of a live server for tests, in place of a browser."""

import base64
import contextlib
import io
import json
import time

import av
import numpy as np
from websockets.sync.client import connect


class Client:
    """Sends messages to a server, and keeps its answers."""

    def __init__(self, url, **fields):
        self.socket = connect(url, max_size=None, open_timeout=30)
        self.events, self.video = [], b""
        if fields is not None:
            self.send("session.create", **({"version": 1} | fields))

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.socket.close()

    def send(self, kind, **fields):
        self.socket.send(json.dumps({"type": kind, **fields}))

    def speak(self, samples):
        """Sends samples at 16 kHz."""
        for start in range(0, len(samples), 8000):
            self.socket.send((samples[start : start + 8000] * 32767).astype("<i2").tobytes())

    def read(self, seconds):
        """Takes messages for some seconds."""
        ends = time.monotonic() + seconds
        with contextlib.suppress(TimeoutError):
            while (left := ends - time.monotonic()) > 0:
                self.take(self.socket.recv(timeout=left))

    def until(self, kind, limit_s=30.0):
        """Takes messages until an event of a kind, which is returned."""
        ends = time.monotonic() + limit_s
        while True:
            event = self.take(self.socket.recv(timeout=ends - time.monotonic()))
            if event and event["type"] == kind:
                return event

    def take(self, message):
        if isinstance(message, bytes):
            self.video += message
            return None
        self.events.append(json.loads(message))
        return self.events[-1]

    def decoded(self):
        """Frames `[T H W 3]`, sound, and the start of both in seconds."""
        with av.open(io.BytesIO(self.video)) as container:
            frames = list(container.decode(video=0))
        with av.open(io.BytesIO(self.video)) as container:
            sound = list(container.decode(audio=0))
        samples = np.concatenate([part.to_ndarray()[0] for part in sound])
        pixels = np.stack([frame.to_ndarray(format="rgb24") for frame in frames])
        return pixels, samples, [float(frame.time) for frame in frames]


def base64_of(data):
    return base64.b64encode(data).decode()

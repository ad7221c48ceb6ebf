"""A live server under a real client: reaction, interrupts, pacing, memory, admission.

    python benchmarks/live.py --minutes 30 --out benchmarks/results/live_small_mesh1.json
    python benchmarks/live.py --url ws://host:8000/v1/avatar --token SECRET

Without `--url` it starts `launch/serve.py` itself, and reads that process's memory. Everything is
seen from the client's end: a moment of the video counts as there when the bytes that hold it have
come, and sound as sound when it is decoded and loud.
"""

import argparse
import bisect
import contextlib
import io
import json
import math
import os
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import av
import numpy as np
from tqdm import tqdm
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect

from benchmarks.common import (
    DEMO,
    ROOT,
    emit,
    environment,
    quantiles,
    read_voice,
    robust_slope,
    slope,
)
from launch import cli

RATE = 16_000
STEADY_MINUTES = 10 - 0.1  # of memory, for a slope
LOUD = 0.005  # of full scale, mean over an AAC frame; the avatar's silence is exactly zero


def parse_arguments(argv=None) -> argparse.Namespace:
    parser = cli.Parser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--url", default="", help="of a server that runs already; else one is started")
    add("--token", default="", help="of that server")
    add("--serve", default="--mesh 1", help="flags of the server to start")
    add("--minutes", type=float, default=15, help="of steady talk; memory has a slope from 15 on")
    add("--trials", type=int, default=10, help="reactions and interrupts of each kind")
    add("--reconnects", type=int, default=20, help="sessions begun and ended in a row")
    add("--out", default=None, help="JSON file to write")
    arguments = parser.parse_args(argv)
    if not 0 < arguments.minutes < math.inf:
        parser.error(f"--minutes {arguments.minutes}: expected a number above 0")
    if arguments.trials < 1 or arguments.reconnects < 0:
        parser.error("--trials must be at least 1, and --reconnects at least 0")
    return arguments


class Server:
    """The server under test, as a process of its own."""

    def __init__(self, flags: str):
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))
            port = taken.getsockname()[1]
        command = [sys.executable, str(ROOT / "launch/serve.py"), "--port", str(port)]
        self.process = subprocess.Popen(command + shlex.split(flags), cwd=ROOT)
        self.url = f"ws://127.0.0.1:{port}/v1/avatar"
        self._page = f"http://127.0.0.1:{port}"
        while True:
            if self.process.poll() is not None:
                raise ConnectionError(f"the server ended with status {self.process.returncode}")
            with contextlib.suppress(OSError):
                with urllib.request.urlopen(self._page + "/readyz") as answer:
                    if answer.status == 200:
                        return
            time.sleep(0.2)

    def resident_mib(self) -> float:
        """Memory of the process that is in RAM."""
        pages = int(Path(f"/proc/{self.process.pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE") / 2**20

    def stop(self) -> None:
        """Lets it drain and end."""
        self.process.send_signal(signal.SIGTERM)
        self.process.wait(60)


@dataclass
class Packet:
    """A packet of the received video: what moment it holds and when it was there."""

    start_s: float
    end_s: float
    came: float
    loudness: float = 0.0  # of sound


@dataclass
class Received:
    """Everything a client got, with the time of each message."""

    events: list[tuple[float, dict]] = field(default_factory=list)
    video: bytearray = field(default_factory=bytearray)
    ends: list[int] = field(default_factory=list)  # bytes received until `times`
    times: list[float] = field(default_factory=list)

    def packets(self) -> tuple[list[Packet], list[Packet]]:
        """Packets of picture and sound, in order."""
        found = {"video": [], "audio": []}
        with av.open(io.BytesIO(bytes(self.video))) as container:
            for packet in container.demux(audio=0, video=0):
                if packet.pts is None:
                    continue
                at = min(
                    bisect.bisect_left(self.ends, packet.pos + packet.size), len(self.ends) - 1
                )
                unit, kind = float(packet.time_base), packet.stream.type
                start = packet.pts * unit
                made = Packet(start, start + packet.duration * unit, self.times[at])
                if kind == "audio":
                    sound = [frame.to_ndarray() for frame in packet.decode()]
                    made.loudness = float(np.abs(np.concatenate(sound, 1)).mean()) if sound else 0.0
                found[kind].append(made)
        return found["video"], found["audio"]


class Client:
    """One session; a thread takes what comes, as a browser would."""

    def __init__(self, url: str, token: str):
        self._open = contextlib.ExitStack()
        self.socket = self._open.enter_context(connect(url, max_size=None, open_timeout=30))
        self.got, self.is_open = Received(), True
        self._changed = threading.Condition()
        self.began = time.monotonic()
        self.send("session.create", version=1, token=token, sample_rate=RATE)
        self._thread = threading.Thread(target=self._take, daemon=True)
        self._thread.start()

    def _take(self) -> None:
        with contextlib.suppress(ConnectionClosed):
            for message in self.socket:
                now = time.monotonic()
                with self._changed:
                    if isinstance(message, bytes):
                        self.got.video += message
                        self.got.ends.append(len(self.got.video))
                        self.got.times.append(now)
                    else:
                        self.got.events.append((now, json.loads(message)))
                    self._changed.notify_all()
        self.is_open = False
        with self._changed:
            self._changed.notify_all()

    def send(self, kind: str, **fields) -> float:
        """Sends a message; returns when."""
        self.socket.send(json.dumps({"type": kind, **fields}))
        return time.monotonic()

    def say(self, samples: np.ndarray) -> float:
        """Sends sound at once; returns when."""
        now = time.monotonic()
        self.socket.send((samples * 32767).astype("<i2").tobytes())
        return now

    def talk(self, samples: np.ndarray, began: float | None = None) -> float:
        """Sends sound as a microphone does, from `began` on; returns that."""
        began, piece = time.monotonic() if began is None else began, RATE // 50
        for start in range(0, len(samples), piece):
            part = samples[start : start + piece]
            # A microphone has a piece when its last sample is spoken.
            wait = began + (start + len(part)) / RATE - time.monotonic()
            if wait > 0:
                time.sleep(wait)
            self.say(part)
        return began

    def until(self, *kinds: str, limit_s: float = 60) -> tuple[float, dict]:
        """Waits for an event that has not been waited for yet; returns it and when it came."""
        ends, seen = time.monotonic() + limit_s, 0
        with self._changed:
            while True:
                for i in range(seen, len(self.got.events)):
                    when, event = self.got.events[i]
                    if event["type"] in kinds and not event.get("taken"):
                        event["taken"] = True
                        return when, event
                seen = len(self.got.events)
                left = ends - time.monotonic()
                if not self.is_open or left <= 0:
                    raise RuntimeError(f"{kinds} did not come: {self.got.events[-3:]}")
                self._changed.wait(left)

    def close(self) -> None:
        """Ends the session."""
        self._open.close()
        self._thread.join(10)


def begin(url: str, token: str, limit_s: float = 20) -> Client:
    """A client with a session, as soon as there is a seat: those who leave free theirs soon."""
    ends = time.monotonic() + limit_s
    while True:
        client = Client(url, token)
        _, event = client.until("session.created", "error")
        if event["type"] == "session.created":
            return client
        client.close()
        if time.monotonic() > ends:
            raise RuntimeError(f"no session: {event}")
        time.sleep(0.2)


def reactions(url: str, token: str, voice: np.ndarray, trials: int, *, live: bool) -> dict:
    """From the first sample of speech sent to the first sound and picture of it received."""
    sound_s, picture_s = [], []
    client = begin(url, token)
    sent = []
    for _ in tqdm(range(trials), desc="microphone" if live else "file"):
        time.sleep(1.5 + np.random.default_rng(len(sent)).uniform(0, 0.75))
        sent.append(client.talk(voice) if live else client.say(voice))
        client.send("audio.commit")
        client.until("playback_finished")
    time.sleep(1)
    client.close()
    picture, sound = client.got.packets()
    for when in sent:
        heard = next(p for p in sound if p.came > when and p.loudness > LOUD)
        seen = next(p for p in picture if p.end_s > heard.start_s)
        sound_s.append(heard.came - when)
        picture_s.append(max(seen.came, heard.came) - when)
    return {"sound": quantiles(sound_s), "picture": quantiles(picture_s)}


def interrupts(url: str, token: str, voice: np.ndarray, trials: int) -> dict:
    """From `clear` sent to the last sound received."""
    client = begin(url, token)
    sound_s, clears = [], []
    for n in tqdm(range(trials), desc="interrupt"):
        client.say(np.resize(voice, 10 * RATE))
        client.until("playback_started")
        time.sleep(1 + 0.1 * n)
        clears.append(client.send("clear"))
        client.until("cleared")
        time.sleep(2)
    client.close()
    _, sound = client.got.packets()
    for sent, following in zip(clears, [*clears[1:], float("inf")], strict=True):
        # Sound of the next utterance is later than its own start: half a second before `clear`.
        late = [
            p.came - sent
            for p in sound
            if sent < p.came < min(sent + 2, following - 0.5) and p.loudness > LOUD
        ]
        sound_s.append(max(late, default=0.0))
    return {"sound_stops": quantiles(sound_s)}


def steady(url: str, token: str, voice: np.ndarray, minutes: float, server: Server | None) -> dict:
    """Talk without end, as from a microphone: pace, offset of sound and picture, memory."""
    client = begin(url, token)
    memory, began = [], time.monotonic()
    bar = tqdm(total=round(60 * minutes), desc="steady", unit="s")
    for second in range(round(60 * minutes)):
        start = second * RATE % (len(voice) - RATE)
        client.talk(voice[start : start + RATE], began + second)
        if server:
            memory.append((time.monotonic() - began, server.resident_mib()))
        bar.update()
    wall_s = time.monotonic() - began
    client.close()
    picture, sound = client.got.packets()
    told = [event for _, event in client.got.events if event["type"] == "stats"]
    result = {
        "minutes": round(wall_s / 60, 2),
        "video_per_wall": round((picture[-1].end_s - picture[0].start_s) / wall_s, 4),
        "first_frame_ms": round(1000 * (picture[0].came - client.began), 1),
        "late_s": told[-1]["late_s"] if told else None,
        "frames_dropped": told[-1]["dropped"] if told else None,
        "block": quantiles([event["block_s"] for event in told]),
        "av_offset": offsets(picture, sound),
        "pacing": pacing(picture),
    }
    if memory:
        result["memory_mib"] = growth(*zip(*memory, strict=True))
    return result


def growth(seconds: Sequence[float], mib: Sequence[float]) -> dict:
    """Memory after the first third, in which caches fill; its slope if ten minutes are left."""
    times, levels = np.array(seconds), np.array(mib)
    steady = times > times[-1] / 3
    times, levels = times[steady], levels[steady]
    minutes = (times[-1] - times[0]) / 60
    per_hour = 3600 * robust_slope(times, levels) if minutes >= STEADY_MINUTES else None
    return {
        "minutes": round(minutes, 1),
        "begin": round(float(levels[0]), 1),
        "end": round(float(levels[-1]), 1),
        "least": round(float(levels.min()), 1),
        "most": round(float(levels.max()), 1),
        "slope_per_hour": None if per_hour is None else round(per_hour, 1),
    }


def offsets(picture: list[Packet], sound: list[Packet]) -> dict:
    """Lead of the picture over the sound in video time, at the arrival of every frame."""
    came = np.array([p.came for p in sound])
    ends = np.maximum.accumulate([p.end_s for p in sound])
    times, ahead = [], []
    for packet in picture[16:]:
        known = bisect.bisect_right(came, packet.came)
        if known:
            times.append(packet.came)
            ahead.append(packet.end_s - ends[known - 1])
    hours = (np.array(times) - times[0]) / 3600
    return {
        "mean_ms": round(1000 * float(np.mean(ahead)), 2),
        "p95_ms": round(1000 * float(np.percentile(np.abs(ahead), 95)), 2),
        "drift_ms_per_hour": round(1000 * slope(hours, ahead), 2),
    }


def pacing(picture: list[Packet]) -> dict:
    """Deviation of frames from their due times, relative to the median frame."""
    off = np.array([p.came - p.start_s for p in picture[32:]])
    return quantiles(np.abs(off - np.median(off)))


def memory_after(url: str, token: str, voice: np.ndarray, count: int, server: Server) -> dict:
    """Memory before and after clients that come, talk and go, in every way there is."""

    def come_and_go(leave):
        client = begin(url, token)
        client.say(voice)
        client.until("playback_started")
        leave(client)

    def rested() -> float:
        time.sleep(3)
        return round(server.resident_mib(), 1)

    come_and_go(Client.close)
    result = {"before_mib": rested()}
    for _ in tqdm(range(count), desc="reconnect"):
        come_and_go(Client.close)
    result[f"after_{count}_reconnects_mib"] = rested()
    for _ in tqdm(range(5), desc="vanish"):
        come_and_go(lambda client: client.socket.socket.shutdown(socket.SHUT_RDWR))
    result["after_5_vanished_mib"] = rested()
    return result


def admission(url: str, token: str) -> int:
    """Opens sessions until the server is busy; counts them."""
    clients = []
    try:
        while True:
            clients.append(Client(url, token))
            _, event = clients[-1].until("session.created", "error")
            if event["type"] == "error":
                return len(clients) - 1
    finally:
        for client in clients:
            client.close()


def main(argv=None) -> dict:
    arguments = parse_arguments(argv)
    server = None if arguments.url else Server(arguments.serve)
    url, token = arguments.url or server.url, arguments.token
    try:
        voice = read_voice(DEMO, RATE)
        words = voice[np.argmax(np.abs(voice) > 0.1) :]  # from the first loud sample on
        told = {
            "reaction_file": reactions(url, token, words[: 2 * RATE], arguments.trials, live=False),
            "reaction_microphone": reactions(
                url, token, words[: 2 * RATE], arguments.trials, live=True
            ),
            "interrupt": interrupts(url, token, words, arguments.trials),
            "sessions_admitted": admission(url, token),
        }
        if server:
            told["memory"] = memory_after(url, token, words, arguments.reconnects, server)
        told["steady"] = steady(url, token, voice, arguments.minutes, server)
    finally:
        if server:
            server.stop()
    return emit({"benchmark": "live", **told, **environment(serve=arguments.serve)}, arguments.out)


if __name__ == "__main__":
    cli.run(main)

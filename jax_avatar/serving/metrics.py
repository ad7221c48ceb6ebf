"""Server metrics for Prometheus."""

import functools
from collections import Counter as Counts
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from jax_avatar.live.pacing import LiveStats
from jax_avatar.live.session import LiveSession

__all__ = ["PROTOCOLS", "Metrics"]

PROTOCOLS = ("websocket", "webrtc")
"""Transports by which sessions are counted."""

_SECONDS = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 5.0, 10.0)
_OFFSETS = (0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 1.0)


@dataclass(frozen=True)
class TurnMetrics:
    """Metrics of conversations.

    Attributes:
        seconds: of each part of a turn.
        failures: by the part that failed.
    """

    seconds: Histogram
    failures: Counter

    def add(self, timing: Mapping[str, int | float]) -> None:
        """Adds the seconds of each part of a turn; its "id" is none."""
        for part, length in timing.items():
            if part != "id":
                self.seconds.labels(part).observe(length)


class Metrics:
    """Metrics in a registry of their own, so that several servers may live in a process."""

    def __init__(self):
        self.registry = CollectorRegistry()
        ours = {"namespace": "avatar", "registry": self.registry}
        counter, gauge = functools.partial(Counter, **ours), functools.partial(Gauge, **ours)
        seconds = functools.partial(Histogram, buckets=_SECONDS, **ours)
        self.started = counter("sessions_started", "Sessions begun", ["protocol"])
        self.ended = counter("sessions_ended", "Sessions ended", ["reason"])
        self.refused = counter("sessions_refused", "Sessions refused", ["code"])
        self.errors = counter("client_errors", "Invalid messages", ["code"])
        self.sent_bytes = counter("sent_bytes", "Bytes of video")
        self.encode_s = seconds(
            "encode_seconds", "Encoding of a chunk", buckets=(0.002, 0.005, *_SECONDS)
        )
        self.first_frame_s = seconds("first_frame_seconds", "From session.create to video")
        self.reaction_s = seconds("reaction_seconds", "From audio in silence to its frames")
        self.av_offset_s = seconds(
            "av_offset_seconds", "Difference in length of sent picture and sound", buckets=_OFFSETS
        )
        self.turns = TurnMetrics(
            seconds("turn_seconds", "Parts of a turn of a conversation", ["part"]),
            counter("reaction_failures", "Turns of a conversation that failed", ["why"]),
        )
        self._block_s = seconds("block_seconds", "A block, from hand-over to frames")
        self._part_s = gauge("part_seconds", "A block in each part, before the start", ["part"])
        self._counts = {  # by fields of `LiveStats`
            "frames": counter("frames", "Frames delivered"),
            "dropped": counter("frames_dropped", "Frames made but not delivered"),
            "late": counter("chunks_late", "Chunks that were not ready in time"),
            "late_s": counter("late_seconds", "Seconds by which video was put off"),
            "missing_s": counter("starved_seconds", "Silence inserted into speech"),
        }
        self._sessions = gauge("sessions", "Sessions under way", ["protocol"])
        self._levels = {  # by arguments of `set_levels`, and attributes of `LiveSession`
            "seats": gauge("seats", "Sessions that fit"),
            "ready_frames": gauge("ready_frames", "Frames that wait, all sessions"),
            "queued_s": gauge("queued_seconds", "Speech that waits, all sessions"),
        }

    def set_levels(self, sessions: Iterable[tuple[str, LiveSession]], seats: int) -> None:
        """Sets all gauges.

        Args:
            sessions: under way, each with its protocol.
            seats: number of sessions that fit.
        """
        sessions = list(sessions)
        counts = Counts(protocol for protocol, _ in sessions)
        for protocol in PROTOCOLS:
            self._sessions.labels(protocol).set(counts[protocol])
        self._levels["seats"].set(seats)
        for name in ("ready_frames", "queued_s"):
            self._levels[name].set(sum(getattr(live, name) for _, live in sessions))

    def set_parts(self, parts: Mapping[str, float]) -> None:
        """Sets the seconds of a block in each part."""
        for name, seconds in parts.items():
            self._part_s.labels(name).set(seconds)

    def add(self, before: LiveStats, now: LiveStats) -> None:
        """Adds the difference between two moments of a session."""
        for name, counter in self._counts.items():
            counter.inc(getattr(now, name) - getattr(before, name))
        if now.frames and now.step_s != before.step_s:
            self._block_s.observe(now.step_s)

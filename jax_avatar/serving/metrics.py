"""Server metrics for Prometheus."""

from collections import Counter as Counts
from collections.abc import Iterable, Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from jax_avatar.live.pacing import LiveStats
from jax_avatar.live.session import LiveSession

__all__ = ["PROTOCOLS", "Metrics"]

PROTOCOLS = ("websocket", "webrtc")  # by which sessions are counted

_SECONDS = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 5.0, 10.0)


class Metrics:
    """One registry per server, so that several may live in a process."""

    def __init__(self):
        self.registry = CollectorRegistry()
        ours = {"namespace": "avatar", "registry": self.registry}
        self.sessions = Gauge("sessions", "Sessions under way", ["protocol"], **ours)
        self.seats = Gauge("seats", "Sessions that fit", **ours)
        self.started = Counter("sessions_started", "Sessions begun", ["protocol"], **ours)
        self.ended = Counter("sessions_ended", "Sessions ended", ["reason"], **ours)
        self.refused = Counter("sessions_refused", "Sessions refused", ["code"], **ours)
        self.errors = Counter("client_errors", "Bad messages", ["code"], **ours)
        self.frames = Counter("frames", "Frames delivered", **ours)
        self.dropped = Counter("frames_dropped", "Frames made but not delivered", **ours)
        self.late = Counter("chunks_late", "Chunks that were not ready in time", **ours)
        self.late_s = Counter("late_seconds", "Seconds by which video was put off", **ours)
        self.missing_s = Counter("starved_seconds", "Silence in the midst of speech", **ours)
        self.sent_bytes = Counter("sent_bytes", "Bytes of video", **ours)
        self.step_s = Histogram(
            "block_seconds", "A block, from hand-over to frames", buckets=_SECONDS, **ours
        )
        self.encode_s = Histogram(
            "encode_seconds", "Encoding of a chunk", buckets=(0.002, 0.005, *_SECONDS), **ours
        )
        self.first_frame_s = Histogram(
            "first_frame_seconds", "From session.create to video", buckets=_SECONDS, **ours
        )
        self.reaction_s = Histogram(
            "reaction_seconds", "From audio in silence to its frames", buckets=_SECONDS, **ours
        )
        self.part_s = Gauge(
            "part_seconds", "A block in each part, measured before the start", ["part"], **ours
        )
        self.av_offset_s = Histogram(
            "av_offset_seconds",
            "By how much sent picture and sound differ in length",
            buckets=(0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 1.0),
            **ours,
        )
        self.ready_frames = Gauge("ready_frames", "Frames that wait, all sessions", **ours)
        self.queued_s = Gauge("queued_seconds", "Speech that waits, all sessions", **ours)

    def set_levels(self, sessions: Iterable[tuple[str, LiveSession]], seats: int) -> None:
        """Notes what is now: sessions with their protocols, what waits in them, how many fit."""
        sessions = list(sessions)
        counts = Counts(protocol for protocol, _ in sessions)
        for protocol in PROTOCOLS:
            self.sessions.labels(protocol).set(counts[protocol])
        self.ready_frames.set(sum(live.ready_frames for _, live in sessions))
        self.queued_s.set(sum(live.queued_s for _, live in sessions))
        self.seats.set(seats)

    def set_parts(self, parts: Mapping[str, float]) -> None:
        """Notes how long a block takes in each part."""
        for name, seconds in parts.items():
            self.part_s.labels(name).set(seconds)

    def add(self, before: LiveStats, now: LiveStats) -> None:
        """Counts what a session has done since `before`."""
        for name in ("frames", "dropped", "late", "late_s", "missing_s"):
            getattr(self, name).inc(getattr(now, name) - getattr(before, name))
        if now.frames and now.step_s != before.step_s:
            self.step_s.observe(now.step_s)

"""Segments of an agent's speech: received as byte streams, each reported as finished once."""

from collections.abc import AsyncIterator, Callable
from typing import Any

from livekit import rtc
from livekit.agents.voice.avatar import AudioReceiver, AudioSegmentEnd, DataStreamAudioReceiver

__all__ = ["SegmentReceiver"]


class SegmentReceiver(AudioReceiver):
    """Receives speech, and reports to the agent when each of its segments has been played.

    An agent waits for one report per stream it has opened. `AvatarRunner` has one flag for all of
    them, set when it reads sound and reset at an end: it misses a second segment that was read
    while the first one played, and one that is cleared before any sound of it was read. So its
    reports are dropped, and `AvatarVideoGenerator` gives them. Streams that were opened before a
    clear and not read yet are dropped, too.
    """

    def __init__(self, room: Any, *, sender_identity: str):
        """Receives through the package's own receiver.

        Args:
            room: an `rtc.Room`, joined.
            sender_identity: of the agent.
        """
        super().__init__()
        counted = _StreamCountingRoom(room, self._counted)
        self._inner = DataStreamAudioReceiver(counted, sender_identity=sender_identity)
        self._num_open = 0  # segments begun and not yet finished
        self._num_cleared = 0

    async def start(self) -> None:
        """Starts to receive, when the agent is in the room."""
        await self._inner.start()
        self._inner.on("clear_buffer", self._clear)

    def __aiter__(self) -> AsyncIterator[rtc.AudioFrame | AudioSegmentEnd]:
        return aiter(self._inner)

    async def aclose(self) -> None:
        """Stops receiving."""
        await self._inner.aclose()

    def notify_playback_started(self) -> None:
        """Does nothing; see `report_started`."""

    def notify_playback_finished(self, playback_position: float, interrupted: bool) -> None:
        """Does nothing; see `report_finished` and `report_cleared`."""

    def report_started(self) -> None:
        """Reports that the first sound of a segment is played."""
        self._inner.notify_playback_started()

    def report_finished(self, position_s: float) -> None:
        """Reports that a segment was played to its end."""
        self._num_open = max(0, self._num_open - 1)
        self._inner.notify_playback_finished(position_s, interrupted=False)

    def report_cleared(self, position_s: float) -> None:
        """Reports all open segments as interrupted: the first at a position, the others at 0."""
        for number in range(self._num_open):
            self._inner.notify_playback_finished(0.0 if number else position_s, interrupted=True)
        self._num_open = 0

    def _clear(self) -> None:
        self._num_cleared += 1
        self.emit("clear_buffer")

    def _counted(self, reader: Any) -> Any:
        """Stream of a segment, which ends when it is cleared."""
        self._num_open += 1
        cleared = self._num_cleared
        return _Stream(reader, lambda: self._num_cleared != cleared)


class _Stream:
    """Reader that ends early when `is_over()`."""

    def __init__(self, reader: Any, is_over: Callable[[], bool]):
        self._reader, self._is_over = reader, is_over

    def __getattr__(self, name: str) -> Any:
        return getattr(self._reader, name)

    def __aiter__(self) -> "_Stream":
        return self

    async def __anext__(self) -> bytes:
        if self._is_over():
            raise StopAsyncIteration
        part = await self._reader.__anext__()
        if self._is_over():
            raise StopAsyncIteration
        return part


class _StreamCountingRoom:
    """Room whose byte streams are wrapped before their handler gets them."""

    def __init__(self, room: Any, wrap: Callable[[Any], Any]):
        self._room, self._wrap = room, wrap

    def __getattr__(self, name: str) -> Any:
        return getattr(self._room, name)

    def register_byte_stream_handler(self, topic: str, handler: Callable[..., None]) -> None:
        def wrapped(reader: Any, participant: str) -> None:
            handler(self._wrap(reader), participant)

        self._room.register_byte_stream_handler(topic, wrapped)

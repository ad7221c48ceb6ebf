"""Real-time session: accepts audio at any time, emits video paced by its audio.

    push_audio --JitterBuffer--> blocks --AvatarSession--> frames --pace--> chunks of picture and
    (any time)                  (feeder, in time)         (fetcher)        sound (async iterator)

Audio is the clock. A block is begun just in time for its frames to be ready when they are due;
where no speech waits it is a block of silence, in which the face idles. The event loop never waits
for a device: blocks are handed over in one worker thread and fetched in another.
"""

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from jax_avatar.live.jitter_buffer import JitterBuffer
from jax_avatar.live.turn import State, TurnState
from jax_avatar.streaming.sample_queue import SampleQueue
from jax_avatar.streaming.session import AvatarSession

__all__ = ["Clock", "Event", "LiveChunk", "LiveSession", "LiveSettings", "LiveStats"]

_LATE_FRAMES = 0.5  # that a block may be late now and then; whoever plays it has more in hand


class Clock:
    """Seconds that never go back, and waiting for them to pass."""

    def now(self) -> float:
        """Seconds since some moment."""
        return time.monotonic()

    async def wait(self, signal: asyncio.Event, seconds: float) -> None:
        """Returns when the signal is set or the time has passed; clears the signal."""
        # Not `wait_for`: before Python 3.12 it loses a cancellation that comes with the signal.
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await signal.wait()
        signal.clear()


@dataclass(frozen=True)
class LiveSettings:
    """Trade-off of a live session between latency and smoothness.

    Attributes:
        chunk_frames: most frames delivered at once.
        lead_s: how much sooner than needed a block is begun whose speech is there already.
        target_delay_s: speech that an unfinished segment keeps in hand, against late arrivals; more
            after some that came later, see `JitterBuffer`.
        most_waiting_s: speech that may wait to be spoken; more is refused.
        in_flight: blocks that may be under way on the devices at once.
    """

    chunk_frames: int = 2
    lead_s: float = 0.3
    target_delay_s: float = 0.03
    most_waiting_s: float = 120.0
    in_flight: int = 2

    def __post_init__(self):
        if self.chunk_frames < 1 or self.in_flight < 1:
            raise ValueError(
                f"chunk_frames {self.chunk_frames} and in_flight {self.in_flight} must be at "
                "least 1."
            )
        if min(self.lead_s, self.target_delay_s) < 0 or self.most_waiting_s <= 0:
            raise ValueError(
                f"lead_s {self.lead_s}, target_delay_s {self.target_delay_s} and most_waiting_s "
                f"{self.most_waiting_s} are seconds; none may be negative, nor the last 0."
            )


@dataclass(frozen=True)
class Event:
    """Something that happened at a moment of the video.

    Attributes:
        name: "state", "playback_started", "playback_finished" or "prompt_changed".
        at_s: on the clock of the video.
        data: what there is to say of it, plain values.
    """

    name: str
    at_s: float
    data: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class LiveChunk:
    """Picture and sound of the same moment.

    Attributes:
        frames: `[T H W 3]` uint8.
        sound: mono samples in [-1, 1] at the speech encoder's rate, as long as the frames.
        marks: of each sample, 1 where it is speech, 0 where silence was put.
        start_s: when the first frame is shown, from the start of the video.
        events: that happened since the chunk before.
    """

    frames: np.ndarray
    sound: np.ndarray
    marks: np.ndarray
    start_s: float
    events: tuple[Event, ...]


@dataclass
class LiveStats:
    """Counts since the start; for monitoring.

    Attributes:
        frames: delivered.
        dropped: frames made but never delivered, because something newer took their place.
        late: chunks delivered later than their time, since they were not ready.
        late_s: seconds by which the video has been put off in all.
        missing_s: seconds of silence put where unfinished speech had not come in time.
        step_s: the latest block, from handing it over until frames were there.
    """

    frames: int = 0
    dropped: int = 0
    late: int = 0
    late_s: float = 0.0
    missing_s: float = 0.0
    step_s: float = 0.0


@dataclass
class _Piece:
    """Frames that are ready, with their sound, and which of it is speech."""

    frames: np.ndarray
    sound: np.ndarray
    marks: np.ndarray

    def split(self, frames: int, per_frame: int) -> tuple["_Piece", "_Piece | None"]:
        """The first frames, and the rest."""
        if frames >= len(self.frames):
            return self, None
        n = frames * per_frame
        head = _Piece(self.frames[:frames], self.sound[:n], self.marks[:n])
        return head, _Piece(self.frames[frames:], self.sound[n:], self.marks[n:])


class LiveSession:
    """Real-time session that runs until it is closed.

    All methods belong to one event loop. Use as an asynchronous context manager, and iterate over
    it for `LiveChunk`s: they come when it is time to show them.
    """

    def __init__(
        self,
        session: AvatarSession,
        settings: LiveSettings = LiveSettings(),
        *,
        encode_prompt: Callable[[str], Any] | None = None,
        dispatch: Executor | None = None,
        clock: Clock | None = None,
    ):
        """Binds a session that is ready to start; its model must hear audio as it comes.

        Args:
            session: warmed up, at its first frame; nobody else may use it.
            settings: of pace and delay.
            encode_prompt: prompt -> states `1 p f`, for models that take one.
            dispatch: of one thread, hands blocks to the devices; sessions on the same devices must
                share it. The session's own if not given.
            clock: real time if not given.

        Raises:
            ValueError: the model hears only whole recordings.
        """
        if session.model.settings.audio_window == "whole":
            raise ValueError(
                f"model {session.model.name} is set to hear whole recordings; stream it live with "
                'the setting audio_window "rolling".'
            )
        self.session, self.settings = session, settings
        self.stats, self.turn = LiveStats(), TurnState()
        self._clock = clock or Clock()
        self._encode_prompt = encode_prompt
        self._own_dispatch = dispatch is None
        self._dispatch = dispatch or ThreadPoolExecutor(1, thread_name_prefix="avatar")
        self._fetching = ThreadPoolExecutor(1, thread_name_prefix="frames")
        form = session.format
        rate, self._fps, self._per_frame = form.sample_rate, form.fps, form.samples_per_frame
        self._speech = JitterBuffer(
            rate,
            target_delay=round(settings.target_delay_s * rate),
            capacity=round(settings.most_waiting_s * rate),
        )
        self._sound, self._marks = SampleQueue(), SampleQueue()  # handed over, frames not ready
        self._ready: deque[_Piece] = deque()
        self._fetches: asyncio.Queue[float] = asyncio.Queue()
        self._events: list[Event] = []
        self._fed = self._promised = self._fetched = 0  # pieces
        self._steps: deque[float] = deque(maxlen=16)  # seconds until a block's first piece came
        self._median_s = self._usually_s = 0.0  # of them
        self._takeover: int | None = None  # piece before which ready frames are dropped
        self._is_cleared = False  # the next block is the first after `clear`
        self._first_due: float | None = None  # when frame 0 was or would have been due
        self._text: Any = None
        self._feed_signal, self._ready_signal = asyncio.Event(), asyncio.Event()
        self._tasks: list[asyncio.Task] = []
        self._is_closed = False

    # ---- what a caller does ------------------------------------

    async def __aenter__(self) -> "LiveSession":
        loop = asyncio.get_running_loop()
        self._tasks = [loop.create_task(self._feed()), loop.create_task(self._fetch())]
        for task in self._tasks:
            task.add_done_callback(lambda _: self._ready_signal.set())
        return self

    async def __aexit__(self, *exception: object) -> None:
        await self.close()

    @property
    def state(self) -> State:
        """State of the avatar."""
        return self.turn.state

    @property
    def queued_s(self) -> float:
        """Seconds of speech that wait to be handed to the devices."""
        return len(self._speech) / self._speech.sample_rate

    @property
    def ready_frames(self) -> int:
        """Number of frames waiting for their presentation time."""
        return sum(len(piece.frames) for piece in self._ready)

    @property
    def time_s(self) -> float:
        """Video position: the time of the next frame to be delivered."""
        return self.stats.frames / self._fps

    def push_audio(self, pcm: np.ndarray | bytes, sample_rate: int) -> None:
        """Adds speech, in pieces of any length, as fast as it comes.

        Args:
            pcm: one channel; int16, bytes of 16-bit PCM, or floats in [-1, 1].
            sample_rate: of `pcm`; resampled as a stream.

        Raises:
            ValueError: audio that cannot be, or too much is waiting already.
        """
        self._check_open()
        self._speech.push(pcm, sample_rate)
        self._feed_signal.set()

    def end_segment(self) -> None:
        """Says that the speech pushed so far is a whole; what follows is another utterance."""
        self._speech.end_segment()
        self._feed_signal.set()

    def clear(self) -> float:
        """Interrupts: speech is dropped, sound stops at once, the mouth closes.

        Until the first frames of silence are ready, what was made already is shown without sound;
        then the rest of it is dropped. Face and pose go on from there.

        Returns:
            Seconds of the current segment that were delivered; 0 where nothing was being said.
        """
        if self._speech.is_silent and not self._speech.is_open:
            return 0.0
        position = self._speech.played_s
        self._speech.clear()
        for piece in self._ready:
            piece.sound, piece.marks = np.zeros_like(piece.sound), np.zeros_like(piece.marks)
        for queue in (self._sound, self._marks):
            queue.append(np.zeros_like(queue.take(len(queue))))
        self._is_cleared = True
        if self.state is State.SPEAKING:
            self._move(State.INTERRUPTED)
        self._tell("playback_finished", position_s=position, interrupted=True)
        self._feed_signal.set()
        return position

    async def set_prompt(self, text: str) -> None:
        """Changes the scene's description from the next block on.

        Raises:
            ValueError: the model takes no prompt.
        """
        self._check_open()
        if self._encode_prompt is None:
            raise ValueError(f"model {self.session.model.name} takes no prompt.")
        self._text = await asyncio.to_thread(self._encode_prompt, text)

    def listen(self) -> None:
        """A person talks; see `TurnState.to`."""
        self._move(State.LISTENING)

    def think(self) -> None:
        """An answer is being made; see `TurnState.to`."""
        self._move(State.THINKING)

    def idle(self) -> None:
        """Nobody talks and nothing is being made; see `TurnState.to`."""
        self._move(State.IDLE)

    async def close(self) -> None:
        """Ends the session; what it has on the devices is free for the next one."""
        self._is_closed = True
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        # A thread cannot be cancelled: when these return, nothing uses the session any more.
        loop = asyncio.get_running_loop()
        for executor in (self._dispatch, self._fetching):
            await loop.run_in_executor(executor, lambda: None)
        self._fetching.shutdown()
        if self._own_dispatch:
            self._dispatch.shutdown()
        self._ready.clear()
        self._ready_signal.set()

    def __aiter__(self) -> AsyncIterator[LiveChunk]:
        return self

    async def __anext__(self) -> LiveChunk:
        while not self._is_closed:
            self._raise_failure()
            now = self._clock.now()
            if self._first_due is None and self._ready:
                self._first_due = now
            wait = 3600.0
            if self._ready:
                wait = self._first_due + self.time_s - now
                if wait <= 0:
                    return self._deliver(-wait)
            await self._clock.wait(self._ready_signal, wait)
        raise StopAsyncIteration

    # ---- out ---------------------------------------------------

    def _deliver(self, late_s: float) -> LiveChunk:
        if late_s > 1 / self._fps:  # it was not ready: everything after it is put off
            self._first_due += late_s
            self.stats.late += 1
            self.stats.late_s += late_s
        piece, rest = self._ready.popleft().split(self.settings.chunk_frames, self._per_frame)
        if rest is not None:
            self._ready.appendleft(rest)
        if piece.marks.any() and self.state is not State.SPEAKING:
            self._move(State.SPEAKING)
            self._tell("playback_started")
        ended = self._speech.play(int(piece.marks.sum()))
        start_s = self.time_s
        self.stats.frames += len(piece.frames)
        for length in ended:
            self._tell("playback_finished", position_s=length, interrupted=False)
        if ended and self._speech.is_silent:
            self._move(State.IDLE)
        events, self._events = tuple(self._events), []
        self._feed_signal.set()
        return LiveChunk(piece.frames, piece.sound, piece.marks, start_s, events)

    # ---- in ----------------------------------------------------

    async def _feed(self) -> None:
        """Hands blocks to the devices in time."""
        loop = asyncio.get_running_loop()
        while True:
            while (wait := self._seconds_to_next()) > 0:
                await self._clock.wait(self._feed_signal, wait)
            if self._text is not None:
                text, self._text = self._text, None
                await loop.run_in_executor(self._dispatch, self.session.set_text, text)
                self._tell("prompt_changed")
            samples = self._next_samples()
            began = self._clock.now()
            promised = await loop.run_in_executor(self._dispatch, self.session.feed, samples)
            self._promised += promised
            for _ in range(promised):
                self._fetches.put_nowait(began)

    def _next_samples(self) -> np.ndarray:
        """Speech or silence of the next block, noted down as handed over."""
        if self._takes_over:
            self._takeover = self._fed
            self._is_cleared = False
        spoken = self._speech.take(self.session.samples_wanted)
        self.stats.missing_s += spoken.missing / self._speech.sample_rate
        self._sound.append(spoken.samples)
        self._marks.append(spoken.marks)
        self._fed += self.session.format.pieces_per_block
        return spoken.samples

    def _seconds_to_next(self) -> float:
        """Seconds until the next block must begin; 0 or less if it is due."""
        under_way = self._promised - self._fetched
        if under_way > (self.settings.in_flight - 1) * self.session.format.pieces_per_block:
            return 3600.0  # the fetcher signals
        if self._first_due is None:
            return 0.0 if self.ready_frames == 0 else 3600.0
        if (
            self.ready_frames
            > 2 * self.session.format.block_frames + self.settings.lead_s * self._fps
        ):
            return 3600.0  # nobody takes them; the delivery signals
        if self._takes_over:
            return 0.0
        # Through a pipeline, what has taken over is hurried on by what follows it.
        if self._takeover is not None and self._takeover >= self._promised:
            return 0.0
        coming = under_way * self.session.format.piece_frames
        frames = self.stats.frames + self.ready_frames + coming
        runs_out = self._first_due + frames / self._fps
        return runs_out - self._reserve_s() - self._clock.now()

    def _reserve_s(self) -> float:
        """Lead time in seconds with which the next block begins before frames run out.

        With a microphone this is what its delay has beyond a block: there is always a block that
        waits for speech, and it begins as soon as that is complete.
        """
        if self._is_enough:
            return self._usually_s + self.settings.lead_s
        # Speech that has begun may still come: better a frame half late than a gap.
        step_s = self._median_s if self._speech.is_running else self._usually_s
        return step_s - _LATE_FRAMES / self._fps

    @property
    def _takes_over(self) -> bool:
        """True if frames that are ready but not delivered should be dropped for the next block."""
        return self._is_cleared or (self._speech.is_starting and self._is_enough)

    @property
    def _is_enough(self) -> bool:
        """True if a block of speech, or its last part, is queued."""
        return self._speech.has(self.session.samples_wanted)

    async def _fetch(self) -> None:
        """Takes frames from the devices, and pairs them with their sound."""
        loop = asyncio.get_running_loop()
        while True:
            began = await self._fetches.get()
            frames = await loop.run_in_executor(self._fetching, self.session.fetch)
            if self._takeover is not None and self._fetched >= self._takeover:
                self._take_over()
            took = self._clock.now() - began
            if self._fetched % self.session.format.pieces_per_block == 0:
                self._steps.append(took)
                self._median_s, self._usually_s = np.quantile(self._steps, (0.5, 0.9)).tolist()
            self._fetched += 1
            if self._fetched % self.session.format.pieces_per_block == 0:
                self.stats.step_s = took
            count = len(frames) * self._per_frame
            self._ready.append(_Piece(frames, self._sound.take(count), self._marks.take(count)))
            self._ready_signal.set()
            self._feed_signal.set()

    def _take_over(self) -> None:
        self._takeover = None
        self.stats.dropped += self.ready_frames
        self._ready.clear()
        if self.state is State.INTERRUPTED:
            self._move(State.IDLE)

    # ---- small things ------------------------------------------

    def _move(self, state: State) -> None:
        if self.turn.to(state):
            self._tell("state", state=state.value)

    def _tell(self, name: str, **data: Any) -> None:
        self._events.append(Event(name, self.time_s, data))

    def _check_open(self) -> None:
        if self._is_closed:
            raise ValueError("this live session is closed; start another one.")

    def _raise_failure(self) -> None:
        for task in self._tasks:
            if task.done() and not task.cancelled() and (error := task.exception()):
                raise error

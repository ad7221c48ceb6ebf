"""Real-time session: accepts audio at any time, emits video paced by its audio.

    push_audio --JitterBuffer--> blocks --AvatarSession--> frames --PlayoutBuffer--> chunks of
    (any time)                   (in time: pacing)                                   both (paced)

Audio is the clock. A block begins just in time for its frames to be ready when they are due. A
block without speech is silence, in which the face idles. The event loop never waits for a device.
"""

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from jax_avatar.live.clock import Clock
from jax_avatar.live.jitter_buffer import JitterBuffer, SpeechStatus
from jax_avatar.live.pacing import (
    LiveSettings,
    LiveStats,
    Progress,
    seconds_to_block,
    seconds_to_delivery,
)
from jax_avatar.live.playout import PlayoutBuffer
from jax_avatar.live.turn import State, TurnState
from jax_avatar.live.workers import Workers
from jax_avatar.streaming.session import AvatarSession

__all__ = ["Event", "LiveChunk", "LiveSession", "LiveSettings"]


@dataclass(frozen=True)
class Event:
    """Event at a moment of the video.

    Attributes:
        name: "state", "playback_started", "playback_finished" or "prompt_changed".
        at_s: seconds from the start of the video.
        data: plain values that belong to it.
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
        marks: of each sample, 1 for speech, 0 for inserted silence.
        start_s: seconds from the start of the video to the first frame.
        events: since the chunk before.
    """

    frames: np.ndarray
    sound: np.ndarray
    marks: np.ndarray
    start_s: float
    events: tuple[Event, ...]


class LiveSession:
    """Real-time session that runs until it is closed.

    All methods belong to one event loop. Use as an asynchronous context manager, and iterate over
    it for `LiveChunk`s, each of which comes at the time to show it.
    """

    def __init__(
        self,
        session: AvatarSession,
        settings: LiveSettings | None = None,
        *,
        encode_prompt: Callable[[str], Any] | None = None,
        workers: Workers | None = None,
        clock: Clock | None = None,
    ):
        """Binds a session that is ready to start; its model must hear audio as it comes.

        Args:
            session: warmed up, at its first frame, and used by nothing else.
            settings: of pacing and delay; defaults if not given.
            encode_prompt: prompt -> states `1 p f`, for models that take a prompt.
            workers: threads for the devices; two of its own if not given.
            clock: real time if not given.

        Raises:
            ValueError: the model hears only whole recordings.
        """
        if session.model.settings.audio_window == "whole":
            raise ValueError(
                f"model {session.model.name} is set to hear whole recordings; stream it live with "
                'the setting audio_window "rolling".'
            )
        self.session, self.settings = session, settings or LiveSettings()
        self.turn = TurnState()
        self._encode_prompt = encode_prompt
        self._workers, self._clock = workers or Workers(), clock or Clock()
        rate = session.format.sample_rate
        self._speech = JitterBuffer(
            rate,
            target_delay=round(self.settings.target_delay_s * rate),
            capacity=round(self.settings.most_waiting_s * rate),
        )
        self._playout = PlayoutBuffer(session.format.samples_per_frame)
        self._progress = Progress()
        self._begun_at: asyncio.Queue[float] = asyncio.Queue()  # of each piece to be fetched
        self._events: list[Event] = []
        self._prompt: Any = None  # states for the next block
        self._feed_signal, self._ready_signal = asyncio.Event(), asyncio.Event()

    async def __aenter__(self) -> "LiveSession":
        self._workers.start(self._feed(), self._fetch(), on_end=self._ready_signal.set)
        return self

    async def __aexit__(self, *exception: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Ends the session; its place on the devices is free for the next one."""
        await self._workers.close()
        self._playout.drop_ready()
        self._ready_signal.set()

    # ---- state -------------------------------------------------

    @property
    def state(self) -> State:
        """State of the avatar."""
        return self.turn.state

    @property
    def stats(self) -> LiveStats:
        """Counts since the start."""
        return self._progress.stats

    @property
    def queued_s(self) -> float:
        """Seconds of speech in the jitter buffer."""
        return len(self._speech) / self._speech.sample_rate

    @property
    def ready_frames(self) -> int:
        """Number of frames waiting for their due time."""
        return self._progress.ready

    @property
    def time_s(self) -> float:
        """Video position: the time of the next frame to be delivered."""
        return self.stats.frames / self.session.format.fps

    # ---- commands ----------------------------------------------

    def push_audio(self, pcm: np.ndarray | bytes, sample_rate: int) -> None:
        """Adds speech, in pieces of any length, as fast as it comes.

        Args:
            pcm: one channel; int16, bytes of 16-bit PCM, or floats in [-1, 1].
            sample_rate: of `pcm`; resampled as a stream.

        Raises:
            ValueError: the audio is invalid, or the jitter buffer is full.
        """
        self._check_open()
        self._speech.append(pcm, sample_rate)
        self._feed_signal.set()

    def end_segment(self) -> None:
        """Marks the end of an utterance; later speech belongs to the next one."""
        self._speech.end_segment()
        self._feed_signal.set()

    def clear(self) -> float:
        """Interrupts: speech is dropped, sound stops at once, the mouth closes.

        Frames that exist already are shown without sound until the first frames of silence are
        ready; the rest of them is dropped. Face and pose continue from there.

        Returns:
            Seconds of the current segment that were delivered; 0 without speech.
        """
        if self._speech.is_silent and not self._speech.is_open:
            return 0.0
        position = self._speech.played_s
        self._speech.clear()
        self._playout.mute()
        self._progress = self._progress.clear()
        if self.state is State.SPEAKING:
            self._move(State.INTERRUPTED)
        self._note("playback_finished", position_s=position, interrupted=True)
        self._feed_signal.set()
        return position

    async def set_prompt(self, text: str) -> None:
        """Changes the prompt from the next block on.

        Raises:
            ValueError: the model takes no prompt.
        """
        self._check_open()
        if self._encode_prompt is None:
            raise ValueError(f"model {self.session.model.name} takes no prompt.")
        self._prompt = await asyncio.to_thread(self._encode_prompt, text)

    def listen(self) -> None:
        """Moves to LISTENING: the user talks; see `TurnState.to`."""
        self._move(State.LISTENING)

    def think(self) -> None:
        """Moves to THINKING: an answer is being made; see `TurnState.to`."""
        self._move(State.THINKING)

    def idle(self) -> None:
        """Moves to IDLE: no speech, no answer under way; see `TurnState.to`."""
        self._move(State.IDLE)

    # ---- out ---------------------------------------------------

    def __aiter__(self) -> AsyncIterator[LiveChunk]:
        return self

    async def __anext__(self) -> LiveChunk:
        while not self._workers.is_closed:
            self._workers.raise_failure()
            now = self._clock.now()
            self._progress = self._progress.start_at(now)
            wait = seconds_to_delivery(self.session.format, self._progress, now)
            if wait <= 0:
                return self._deliver(-wait)
            await self._clock.wait(self._ready_signal, wait)
        raise StopAsyncIteration

    def _deliver(self, late_s: float) -> LiveChunk:
        piece, start_s = self._playout.take(self.settings.chunk_frames), self.time_s
        if piece.marks.any() and self.state is not State.SPEAKING:
            self._move(State.SPEAKING)
            self._note("playback_started")
        ended = self._speech.play(int(piece.marks.sum()))
        self._progress = self._progress.deliver(self.session.format, len(piece.frames), late_s)
        for length in ended:
            self._note("playback_finished", position_s=length, interrupted=False)
        if ended and self._speech.is_silent:
            self._move(State.IDLE)
        events, self._events = tuple(self._events), []
        self._feed_signal.set()
        return LiveChunk(piece.frames, piece.sound, piece.marks, start_s, events)

    # ---- workers -----------------------------------------------

    async def _feed(self) -> None:
        """Hands blocks to the devices in time."""
        while True:
            while (wait := self._seconds_to_block()) > 0:
                await self._clock.wait(self._feed_signal, wait)
            if self._prompt is not None:
                prompt, self._prompt = self._prompt, None
                await self._workers.dispatch(self.session.set_text, prompt)
                self._note("prompt_changed")
            samples = self._begin_block()
            begun_at = self._clock.now()
            promised = await self._workers.dispatch(self.session.feed, samples)
            self._progress = self._progress.promise(promised)
            for _ in range(promised):
                self._begun_at.put_nowait(begun_at)

    def _seconds_to_block(self) -> float:
        form, now = self.session.format, self._clock.now()
        return seconds_to_block(form, self.settings, self._progress, self._speech_status, now)

    def _begin_block(self) -> np.ndarray:
        """Speech or silence of the next block."""
        form, status = self.session.format, self._speech_status
        block = self._speech.take(self.session.samples_wanted)
        self._progress = self._progress.begin(form, status, block.missing / form.sample_rate)
        self._playout.append_sound(block)
        return block.samples

    @property
    def _speech_status(self) -> SpeechStatus:
        return self._speech.status(self.session.samples_wanted)

    async def _fetch(self) -> None:
        """Takes frames from the devices, in order."""
        while True:
            begun_at = await self._begun_at.get()
            frames = await self._workers.fetch(self.session.fetch)
            if self._progress.is_overtaken:
                self._playout.drop_ready()
                if self.state is State.INTERRUPTED:
                    self._move(State.IDLE)
            seconds = self._clock.now() - begun_at
            self._progress = self._progress.receive(self.session.format, len(frames), seconds)
            self._playout.append_frames(frames)
            self._ready_signal.set()
            self._feed_signal.set()

    # ---- helpers -----------------------------------------------

    def _move(self, state: State) -> None:
        if self.turn.to(state):
            self._note("state", state=state.value)

    def _note(self, name: str, **data: Any) -> None:
        self._events.append(Event(name, self.time_s, data))

    def _check_open(self) -> None:
        if self._workers.is_closed:
            raise ValueError("this live session is closed; start another one.")

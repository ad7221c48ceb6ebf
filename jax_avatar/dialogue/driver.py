"""Runs the agent: hears, asks, speaks and drives a live session by what the agent decides.

microphone --Ear--> events --agent--> effects --> hear, think, speak (tasks, threads), live session
                      ^                                |
                      +---------- results -------------+

Everything here belongs to one event loop, which never waits for a part: what hangs or fails costs
its turn, not the frames.
"""

import asyncio
import contextlib
import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float

from jax_avatar.dialogue import agent
from jax_avatar.dialogue.agent import Agent, AgentSettings, Effect, Event
from jax_avatar.dialogue.ear import RATE, Detector, Ear, Hear, Paused
from jax_avatar.dialogue.reaction import DialogueState, Reaction
from jax_avatar.dialogue.think import Action, Sentence, Think, ThinkError
from jax_avatar.dialogue.tts import Speak
from jax_avatar.live.clock import Clock
from jax_avatar.live.turn import State

__all__ = ["Body", "Call", "Dialogue", "Parts", "Threads"]

_MOST_SPEECH_S = 60.0  # of one sentence
_MOST_RUNNING = 3  # calls that hang, of one session
_log = logging.getLogger(__name__)

Call = Callable[..., Any]
"""`await call(seconds, function, *arguments)` -> result; TimeoutError if it takes longer."""


@runtime_checkable
class Body(Protocol):
    """Interface of a live session to a conversation."""

    def push_audio(self, pcm: np.ndarray, sample_rate: int) -> None:
        """Adds speech to the newest segment."""

    def end_segment(self) -> None:
        """Ends it."""

    def clear(self) -> float:
        """Drops all speech."""

    def listen(self) -> None:
        """Shows LISTENING."""

    def think(self) -> None:
        """Shows THINKING."""

    def idle(self) -> None:
        """Shows IDLE."""

    async def set_prompt(self, text: str) -> None:
        """Changes the prompt."""


@dataclass(frozen=True)
class Parts:
    """Parts of a conversation, shared by all sessions.

    Attributes:
        hear: speech -> text; None for typed text only.
        detector: makes a detector of speech for one session; None with `hear` None.
        think: text -> action and sentences.
        speak: sentence -> speech.
        settings: limits of each state.
    """

    hear: Hear | None
    detector: Callable[[], Detector] | None
    think: Think
    speak: Speak
    settings: AgentSettings = field(default_factory=AgentSettings)


class Threads:
    """Calls functions in threads of their own; one that hangs is left alone.

    The threads of the event loop are not used: frames need them.
    """

    def __init__(self, most: int = _MOST_RUNNING):
        """Runs nothing yet.

        Args:
            most: calls at the same time, those that hang included.
        """
        self._most, self._running = most, 0

    async def __call__(self, seconds: float, function: Callable, *arguments: Any) -> Any:
        """Result of a function.

        Raises:
            TimeoutError: it takes longer than so many seconds.
            ValueError: too many calls hang.
        """
        if self._running >= self._most:
            raise ValueError(f"{self._running} calls before this one have not ended.")
        loop = asyncio.get_running_loop()
        done: asyncio.Future = loop.create_future()
        self._running += 1

        def finish(result: Any, error: Exception | None) -> None:
            self._running -= 1
            if done.cancelled():
                return
            if error is not None:
                done.set_exception(error)
            else:
                done.set_result(result)

        def run() -> None:
            result, failure = None, None
            try:
                result = function(*arguments)
            except Exception as error:
                failure = error
            with contextlib.suppress(RuntimeError):  # the loop has ended
                loop.call_soon_threadsafe(finish, result, failure)

        threading.Thread(target=run, name="dialogue", daemon=True).start()
        async with asyncio.timeout(seconds):
            return await done


class Dialogue:
    """A conversation of one session.

    Attributes:
        agent: state of the turn-taking.
        messages: what to tell the client, as (type, fields).
    """

    def __init__(
        self,
        body: Body,
        parts: Parts,
        *,
        takes_prompt: bool = False,
        clock: Clock | None = None,
        call: Call | None = None,
    ):
        """Waits for the user.

        Args:
            body: of the avatar.
            parts: ear, mind and voice.
            takes_prompt: True if actions go to the body as prompts.
            clock: real time if not given.
            call: runs what blocks; threads of its own if not given.
        """
        self.agent, self.messages = Agent(), asyncio.Queue()
        self._body, self._parts = body, parts
        self._takes_prompt = takes_prompt
        self._clock, self._call = clock or Clock(), call or Threads()
        self._ear = Ear(parts.detector()) if parts.detector else None
        self._tasks: set[asyncio.Task] = set()
        self._thinking: asyncio.Task | None = None
        self._guessed: asyncio.Task | None = None
        self._sayings: asyncio.Queue[agent.Say | agent.Act] = asyncio.Queue()
        self._num_silenced = 0
        self._prompt, self._wakes_prompt = "", asyncio.Event()
        self._wakes = asyncio.Event()

    # ---- in ----------------------------------------------------

    def hear(self, samples: Float[np.ndarray, " N"]) -> None:
        """Takes sound of the user's microphone, at 16 kHz."""
        for event in self._ear(samples) if self._ear else ():
            match event:
                case Paused(samples=paused):
                    self._guess(paused)
                    continue
                case agent.VoiceEnded(quiet_s=0.0):
                    self._guessed = None  # it ended by its length
            self._push(event)

    def commit(self) -> None:
        """Ends the user's utterance, as by half a second of quiet."""
        self.hear(np.zeros(RATE, np.float32))

    def type(self, text: str) -> None:
        """Takes text that the user typed."""
        self._push(agent.Typed(text))

    def clear(self) -> None:
        """The user interrupts by a button."""
        self._push(agent.Cleared())

    def show(self, chunk: Any) -> None:
        """Takes a `LiveChunk`, with sound at 16 kHz, when it is sent to the client."""
        if self._ear:
            self._ear.play(chunk.sound)
        for event in chunk.events:
            match event.name, event.data:
                case "playback_started", _:
                    self._push(agent.PlaybackStarted())
                case "playback_finished", {"interrupted": False}:
                    self._push(agent.PlaybackFinished())
                case "state", {"state": State.IDLE.value}:
                    self._push(agent.SilenceShown())

    # ---- work --------------------------------------------------

    async def run(self) -> None:
        """Works until it is cancelled; then closes what it has opened."""
        self._start(self._speak())
        self._start(self._change_prompts())
        try:
            while True:
                due = agent.deadline(self.agent, self._parts.settings)
                left = 3600.0 if due is None else due - self._clock.now()
                if left > 0:
                    await self._clock.wait(self._wakes, left)
                self._push(agent.TimePassed())
        finally:
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)

    def _push(self, event: Event) -> None:
        self.agent, effects = agent.step(self.agent, event, self._clock.now(), self._parts.settings)
        for effect in effects:
            self._do(effect)
        if effects:
            self._wakes.set()

    def _do(self, effect: Effect) -> None:
        match effect:
            case agent.Show(state):
                show = {State.LISTENING: self._body.listen, State.THINKING: self._body.think}
                with contextlib.suppress(ValueError):  # while it speaks, it is not shown
                    show.get(state, self._body.idle)()
            case agent.Transcribe(utterance):
                self._start(self._transcribe(utterance, self._guessed))
            case agent.DropVoice():
                if self._ear:
                    self._ear.drop()
            case agent.Ask(turn, heard, state):
                self._thinking = self._start(self._think(turn, heard, state))
            case agent.StopThinking():
                if self._thinking:
                    self._thinking.cancel()
            case agent.Say() | agent.Act():
                self._sayings.put_nowait(effect)
            case agent.EndSegment():
                self._body.end_segment()
            case agent.Silence():
                self._num_silenced += 1
                while not self._sayings.empty():
                    self._sayings.get_nowait()
                self._body.clear()
            case agent.Prompt(text):
                self._prompt = text
                self._wakes_prompt.set()
            case agent.Tell(kind, data):
                self.messages.put_nowait((kind, data))

    def _guess(self, samples: np.ndarray) -> None:
        """Transcribes an utterance that may be over, so that its text is there when it is.

        A guess that is still busy with an earlier pause is not joined by another.
        """
        is_busy = self._guessed and not self._guessed.done()
        is_asked = self.agent.state is State.LISTENING and not is_busy
        self._guessed = self._start(self._text(samples)) if is_asked else None

    async def _text(self, samples: np.ndarray) -> str | Exception:
        try:
            return str(await self._call(self._parts.settings.hear_s, self._parts.hear, samples))
        except Exception as error:
            return error

    async def _transcribe(self, utterance: int, guessed: asyncio.Task | None) -> None:
        samples = self._ear.take(utterance)
        found = await (guessed or self._text(samples))
        is_failure = isinstance(found, Exception)
        text = "" if is_failure else found
        why = _reason(found, "speech recognition") if is_failure else ""
        failed = agent.HearFailed(utterance, why)
        self._push(failed if why else agent.Heard(utterance, text))

    async def _think(self, turn: int, heard: str, state: DialogueState) -> None:
        """Passes an answer on; the iterator is closed whatever happens."""
        why = "the answer ended early"
        answer = self._parts.think(heard, state)
        try:
            async for thought in answer:
                match thought:
                    case Action(text):
                        self._push(agent.ActionKnown(turn, text))
                    case Sentence(text):
                        self._push(agent.SentenceKnown(turn, text))
                    case Reaction():
                        self._push(agent.ReactionKnown(turn, thought))
                        return
        except Exception as error:
            why = _reason(error, "the answer", ThinkError)
        finally:
            if close := getattr(answer, "aclose", None):
                await close()
        self._push(agent.ThinkFailed(turn, why))

    async def _speak(self) -> None:
        """Synthesises sentences, one after the other, while those before are heard."""
        while True:
            saying, before = await self._sayings.get(), self._num_silenced
            why, seconds = "", 0.0
            try:
                samples, rate = await self._sound(saying)
                if before != self._num_silenced:
                    continue
                samples = samples[: round(_MOST_SPEECH_S * rate)]
                self._body.push_audio(samples, rate)
                seconds = len(samples) / rate
            except Exception as error:
                why = _reason(error, "speech")
            if before == self._num_silenced:
                failed = agent.SpeakFailed(saying.turn, why)
                self._push(failed if why else agent.Spoken(saying.turn, seconds))

    async def _sound(self, saying: agent.Say | agent.Act) -> tuple[np.ndarray, int]:
        if isinstance(saying, agent.Act):
            return np.zeros(round(saying.seconds * RATE), np.float32), RATE
        samples, rate = await self._call(
            self._parts.settings.speak_s, self._parts.speak, saying.text
        )
        samples = np.asarray(samples)
        if not len(samples):
            raise ValueError("speech came without a sound.")
        return samples, int(rate)

    async def _change_prompts(self) -> None:
        """Changes the prompt to the latest that was asked for."""
        shown = ""
        while True:
            await self._wakes_prompt.wait()
            self._wakes_prompt.clear()
            if not self._takes_prompt or self._prompt == shown:
                continue
            shown = self._prompt
            try:
                await self._body.set_prompt(shown)
            except Exception as error:
                _log.warning("a prompt could not be set (%s)", type(error).__name__)

    def _start(self, work: Any) -> asyncio.Task:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task


def _reason(error: Exception, part: str, *said: type[Exception]) -> str:
    """Words for the client: those of errors that are meant for it, else only which part failed."""
    if isinstance(error, TimeoutError):
        return f"{part} took too long"
    if isinstance(error, (ValueError, *said)) and str(error):
        return str(error)
    _log.warning("%s failed (%s)", part, type(error).__name__)
    return f"{part} failed"

"""A client's conversation with the avatar: its messages, its microphone, what it is told."""

import time
from collections.abc import Awaitable, Callable, Coroutine

import numpy as np

from jax_avatar.dialogue.driver import Dialogue, Parts
from jax_avatar.dialogue.ear import RATE
from jax_avatar.io.audio import LowLatencyResampler
from jax_avatar.live.jitter_buffer import pcm_samples
from jax_avatar.live.session import LiveChunk, LiveSession
from jax_avatar.serving.messages import (
    AudioAppend,
    AudioCommit,
    Message,
    PromptUpdate,
    ProtocolError,
    SpeechCreate,
    StateUpdate,
    UserAppend,
    UserCommit,
    UserText,
)
from jax_avatar.serving.metrics import TurnMetrics

__all__ = ["Talk"]

_MOST_AHEAD_S = 5.0

Send = Callable[..., Awaitable[None]]


class Talk:
    """The conversation of one session.

    Attributes:
        listens: True if it hears a microphone.
    """

    def __init__(
        self,
        live: LiveSession,
        parts: Parts,
        rate: int,
        metrics: TurnMetrics,
        *,
        takes_prompt: bool,
    ):
        """Waits for the user.

        Args:
            live: the avatar.
            parts: ear, mind and voice.
            rate: samples per second of the client's microphone.
            metrics: of the server.
            takes_prompt: True if the model takes prompts.
        """
        self.listens = parts.hear is not None
        self._live, self._rate, self._metrics = live, rate, metrics
        self._heard_until = 0.0
        self._resampler = LowLatencyResampler(RATE)
        self._dialogue = Dialogue(live, parts, takes_prompt=takes_prompt)

    def handle(self, message: Message) -> bool:
        """Takes a message; returns False if it is for others, too.

        Raises:
            ProtocolError: the avatar speaks for itself, so a client cannot.
        """
        match message:
            case UserAppend(audio=pcm):
                self.hear(pcm_samples(pcm), self._rate)
            case UserCommit() | AudioCommit():  # the latter from a track of WebRTC
                self._dialogue.commit()
            case UserText(text=text):
                self._dialogue.type(text)
            case AudioAppend() | SpeechCreate() | PromptUpdate() | StateUpdate():
                raise ProtocolError(
                    "refused",
                    "this server holds the conversation; send user.append, user.commit, user.text "
                    "or clear.",
                )
            case _:
                return False
        return True

    def hear(self, samples: np.ndarray, rate: int) -> None:
        """Takes sound of the user's microphone, mono in [-1, 1].

        Raises:
            ValueError: it arrives faster than a microphone can record.
        """
        now = time.monotonic()
        self._heard_until = max(self._heard_until, now) + len(samples) / rate
        if self._heard_until > now + _MOST_AHEAD_S:
            self._heard_until = now + _MOST_AHEAD_S
            raise ValueError("the microphone's sound arrives faster than real time; some is lost.")
        if rate != RATE:
            samples = self._resampler(samples, rate)
        self._dialogue.hear(np.asarray(samples, np.float32))

    def show(self, chunk: LiveChunk) -> None:
        """Takes picture and sound that are about to be sent."""
        self._dialogue.show(chunk)

    def clear(self) -> None:
        """The user interrupts."""
        self._dialogue.clear()

    def run(self, send: Send) -> tuple[Coroutine, Coroutine]:
        """Work to be done until it is cancelled; `send` tells the client."""
        return self._dialogue.run(), self._tell(send)

    async def _tell(self, send: Send) -> None:
        while True:
            kind, data = await self._dialogue.messages.get()
            if kind == "turn.timing":
                self._metrics.add(data)
            elif kind == "error":
                self._metrics.failures.labels(data["code"]).inc()
            await send(kind, at_s=self._live.time_s, **data)

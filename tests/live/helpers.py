"""Helpers for tests of live sessions."""

import asyncio
import contextlib

import numpy as np

from jax_avatar.live.clock import Clock

RATE, FPS, PER_FRAME = 16_000, 16, 1000


class FastClock(Clock):
    """Time that runs `speed` times as fast."""

    def __init__(self, speed: float = 4.0):
        self.speed = speed

    def now(self) -> float:
        return super().now() * self.speed

    async def wait(self, signal, seconds):
        await super().wait(signal, seconds / self.speed)


@contextlib.contextmanager
def recording(session):
    """Yields a list that fills with the audio of a session, and with its prompts."""
    heard, feed, set_text = [], session.feed, session.set_text
    session.feed = lambda samples: heard.append(samples) or feed(samples)
    session.set_text = lambda text: heard.append("prompt") or set_text(text)
    try:
        yield heard
    finally:
        session.feed, session.set_text = feed, set_text


def voice(seconds, seed=1, rate=RATE):
    samples = np.random.default_rng(seed).normal(size=round(seconds * rate))
    return (0.1 * samples).clip(-1, 1).astype(np.float32)


async def watch(live, until, limit_s=60.0):
    """Takes chunks until `until(chunks)`; the iterator must not end before."""
    chunks = []
    async with asyncio.timeout(limit_s):
        async for chunk in live:
            chunks.append(chunk)
            if until(chunks):
                return chunks
    raise AssertionError("the session ended")


def events(chunks, name):
    return [event for chunk in chunks for event in chunk.events if event.name == name]


def finished(chunks):
    return bool(events(chunks, "playback_finished"))


def frames_of(chunks):
    return np.concatenate([chunk.frames for chunk in chunks])


def sound_of(chunks):
    return np.concatenate([chunk.sound for chunk in chunks])


def seconds(count):
    """Condition for `watch`: so much video has come."""
    return lambda chunks: sum(len(chunk.frames) for chunk in chunks) >= count * FPS

"""Live session in simulated time, without devices: time passes when all tasks wait."""

import asyncio
import concurrent.futures
import selectors
from types import SimpleNamespace
from unittest.mock import create_autospec

import numpy as np

from jax_avatar.live.clock import Clock
from jax_avatar.live.session import LiveSession, LiveSettings
from jax_avatar.live.workers import Workers
from jax_avatar.streaming.format import StreamFormat
from jax_avatar.streaming.session import AvatarSession
from tests.live.helpers import FPS, PER_FRAME, RATE

# As the small model has them: frames, frames, frames, samples, seconds of a piece after the first.
BLOCK, PIECE, DROPPED, LOOKAHEAD, DECODE_S = 12, 4, 3, 280, 0.012


class _Selector(selectors.DefaultSelector):
    """Waits by letting time pass."""

    now = 0.0

    def select(self, timeout=None):
        ready = super().select(0)
        if not ready and timeout:
            self.now += timeout
        return ready if ready or timeout is not None else super().select(None)


class _Loop(asyncio.SelectorEventLoop):
    def __init__(self):
        self._simulated = _Selector()
        super().__init__(self._simulated)

    def time(self):
        return self._simulated.now


def simulate(coroutine):
    """Runs a coroutine in simulated time."""
    with asyncio.Runner(loop_factory=_Loop) as runner:
        return runner.run(coroutine)


class SimulatedClock(Clock):
    def now(self):
        return asyncio.get_running_loop().time()


class _Worker(concurrent.futures.Executor):
    """Executor whose results come after `delay()` seconds of simulated time."""

    def __init__(self, delay=lambda: 0.0):
        self._delay = delay

    def submit(self, function, *arguments):
        future, result = concurrent.futures.Future(), function(*arguments)
        done = lambda: future.cancelled() or future.set_result(result)  # noqa: E731
        asyncio.get_running_loop().call_later(self._delay(), done)
        return future

    def shutdown(self, wait=True, *, cancel_futures=False):
        pass


def _session():
    """Session that makes black frames."""
    session = create_autospec(AvatarSession, instance=True)
    session.model = SimpleNamespace(name="none", settings=SimpleNamespace(audio_window="rolling"))
    session.format = StreamFormat(FPS, RATE, 2, 2, BLOCK, PIECE)
    session.samples_wanted = (BLOCK - 1 - DROPPED) * PER_FRAME + LOOKAHEAD + PER_FRAME

    def feed(samples):
        assert len(samples) == session.samples_wanted
        session.samples_wanted = BLOCK * PER_FRAME
        return BLOCK // PIECE

    def fetch():
        dropped = DROPPED if session.fetch.call_count == 1 else 0
        return np.zeros((PIECE - dropped, 2, 2, 3), np.uint8)

    session.feed.side_effect, session.fetch.side_effect = feed, fetch
    return session


def simulated_session(block_seconds, **settings):
    """Live session whose blocks take `block_seconds()` until their first piece."""
    session = _session()
    is_first = lambda: session.fetch.call_count % (BLOCK // PIECE) == 1  # noqa: E731
    fetching = _Worker(lambda: block_seconds() if is_first() else DECODE_S)
    workers = Workers(_Worker(), fetching)
    return LiveSession(session, LiveSettings(**settings), workers=workers, clock=SimulatedClock())

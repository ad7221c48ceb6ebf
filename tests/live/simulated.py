"""A live session without devices and without waiting: time passes when all else is done."""

import asyncio
import concurrent.futures
import selectors
from types import SimpleNamespace

import numpy as np

from jax_avatar.live.session import Clock, LiveSession, LiveSettings
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
    """Runs a coroutine for which no real time passes."""
    with asyncio.Runner(loop_factory=_Loop) as runner:
        return runner.run(coroutine)


class SimulatedClock(Clock):
    def now(self):
        return asyncio.get_running_loop().time()


class _Worker(concurrent.futures.Executor):
    """Does at once what it is given, and says so when `delay()` seconds have passed."""

    def __init__(self, delay=lambda: 0.0):
        self._delay = delay

    def submit(self, function, *arguments):
        future, result = concurrent.futures.Future(), function(*arguments)
        done = lambda: future.cancelled() or future.set_result(result)  # noqa: E731
        asyncio.get_running_loop().call_later(self._delay(), done)
        return future

    def shutdown(self, wait=True, *, cancel_futures=False):
        pass


class _Core(AvatarSession):
    """Hears blocks of sound and makes black frames, a piece after the other."""

    def __init__(self):
        self.model = SimpleNamespace(
            name="none", settings=SimpleNamespace(fps=FPS, audio_window="rolling")
        )
        self.speech = SimpleNamespace(sample_rate=RATE, samples_per_frame=PER_FRAME)
        self.block_frames, self.piece_frames, self.blocks, self.fetched = BLOCK, PIECE, 0, 0

    @property
    def samples_wanted(self):
        first = (BLOCK - 1 - DROPPED) * PER_FRAME + LOOKAHEAD + PER_FRAME
        return BLOCK * PER_FRAME if self.blocks else first

    def feed(self, samples):
        assert len(samples) == self.samples_wanted
        self.blocks += 1
        return BLOCK // PIECE

    def fetch(self):
        self.fetched += 1
        return np.zeros((PIECE - (DROPPED if self.fetched == 1 else 0), 2, 2, 3), np.uint8)


def simulated_session(block_seconds, **settings):
    """A session that waits `block_seconds()` for the first piece of each block."""
    core = _Core()
    live = LiveSession(core, LiveSettings(**settings), dispatch=_Worker(), clock=SimulatedClock())
    live._fetching.shutdown()
    is_first = lambda: core.fetched % core.pieces_per_block == 1  # noqa: E731
    live._fetching = _Worker(lambda: block_seconds() if is_first() else DECODE_S)
    return live

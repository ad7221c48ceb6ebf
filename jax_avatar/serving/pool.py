"""Pool of compiled sessions: its capacity, measured, and the free ones."""

import asyncio
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from jax_avatar.streaming.session import AvatarSession
from jax_avatar.weights.folder import AvatarModel

__all__ = ["Budget", "SessionPool", "measure"]

_SPEED_SHARE, _MEMORY_SHARE = 0.85, 0.8  # of the total; the rest is for bursts


@dataclass(frozen=True)
class Budget:
    """Cost of one session, and how many fit.

    Attributes:
        block_s: compute time of a block in seconds.
        video_s: video of a block in seconds.
        session_bytes: device memory of each further session.
        free_bytes: free memory after the first session.
        parts: compute time of a block in each part, see `AvatarSession.part_seconds`.
    """

    block_s: float
    video_s: float
    session_bytes: int
    free_bytes: int
    parts: dict[str, float]

    @property
    def by_speed(self) -> int:
        """Number of sessions in real time."""
        return int(_SPEED_SHARE * self.video_s / self.block_s)

    @property
    def by_memory(self) -> int:
        """Number of sessions in memory."""
        return 1 + int(_MEMORY_SHARE * self.free_bytes / max(1, self.session_bytes))


def measure(session: AvatarSession, weights_bytes: int, blocks: int = 5, rounds: int = 3) -> Budget:
    """Cost of a session, measured by streaming silence through a warm one.

    Args:
        session: warm.
        weights_bytes: size of its networks, which further sessions share.
        blocks: number in a round.
        rounds: number of rounds; their median counts.
    """
    samples = np.zeros(session.format.block_frames * session.format.samples_per_frame, np.float32)
    block_s = []
    for number in range(rounds + 1):
        # In the first round the pipeline fills, and blocks begin to wait for being fetched.
        count = blocks if number else max(blocks, session.layout.stages)
        began = time.perf_counter()
        for _ in range(count):
            for _ in session.push(samples):
                pass
        if number:
            block_s.append((time.perf_counter() - began) / count)
    for _ in session.finish():
        pass
    held = sum(x.nbytes for x in jax.live_arrays()) - weights_bytes
    parts = session.part_seconds()
    video_s = session.format.block_s
    return Budget(float(np.median(block_s)), video_s, max(1, held), _free_bytes(), parts)


class SessionPool:
    """Compiled and warm sessions, each for one client at a time.

    Attributes:
        dispatch: thread that hands blocks of all sessions to the devices.
        budget: cost of a session; None until `open` is done.
        count: number of sessions.
        size: height and width of frames.
    """

    def __init__(
        self,
        build: Callable[[AvatarModel | None], AvatarSession],
        *,
        most: int,
    ):
        """Builds nothing yet; see `open`.

        Args:
            build: makes a session; the first from None, others from the first's model on devices.
            most: largest number of sessions, even if more would fit.
        """
        self._build, self._most = build, most
        self.dispatch = ThreadPoolExecutor(1, thread_name_prefix="dispatch")
        self._free: list[AvatarSession] = []
        self.budget: Budget | None = None
        self.count = 0
        self.model: AvatarModel | None = None
        self.size: tuple[int, int] | None = None

    @property
    def is_ready(self) -> bool:
        """True if sessions can start."""
        return self.budget is not None and self.count > 0

    @property
    def free(self) -> int:
        """Number of free sessions."""
        return len(self._free)

    def open(self) -> None:
        """Compiles and warms up every session; blocks until done."""
        session = self._build(None)
        session.warm_up()
        self.model = session.shared_model()
        networks = (self.model.dit, self.model.vae, self.model.speech)
        weights = sum(x.nbytes for net in networks for x in jax.tree.leaves(net.params))
        budget = measure(session, weights)
        fitting = max(1, min(self._most, budget.by_speed, budget.by_memory))
        sessions = [session]
        while len(sessions) < fitting:
            another = self._build(self.model)
            another.warm_up()
            sessions.append(another)
        self.size = session.format.height, session.format.width
        self._free, self.count, self.budget = sessions, len(sessions), budget

    def take(self) -> AvatarSession | None:
        """A free session, or None."""
        return self._free.pop() if self._free else None

    def give_back(self, session: AvatarSession) -> None:
        """Returns a session; the caller must not use it any more."""
        self._free.append(session)

    async def prepare(self, session: AvatarSession, portrait: np.ndarray, text: Any) -> None:
        """Starts a session anew with a portrait and prompt states."""
        loop = asyncio.get_running_loop()
        await loop.run_in_executor(self.dispatch, lambda: session.reset(portrait, text=text))

    def close(self) -> None:
        """Stops the thread."""
        self.dispatch.shutdown(wait=False, cancel_futures=True)


def _free_bytes() -> int:
    """Free memory of the first device, or of the host if it does not report its own."""
    stats = jax.devices()[0].memory_stats() or {}
    if "bytes_limit" in stats:
        return stats["bytes_limit"] - stats.get("bytes_in_use", 0)
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")

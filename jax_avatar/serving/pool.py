"""Pool of sessions: capacity, and the free ones."""

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

_SPEED_SHARE, _MEMORY_SHARE = 0.85, 0.8  # of what there is; the rest is for bursts


@dataclass(frozen=True)
class Budget:
    """Cost of one session, and how many fit.

    Attributes:
        block_s: seconds that a block of `video_s` seconds takes.
        video_s: of a block.
        session_bytes: of device memory that each further session takes.
        free_bytes: there were, after the first.
        parts: seconds that a block takes in each part, see `AvatarSession.part_seconds`.
        by_speed: sessions in real time.
        by_memory: sessions in memory.
    """

    block_s: float
    video_s: float
    session_bytes: int
    free_bytes: int
    parts: dict[str, float]

    @property
    def by_speed(self) -> int:
        """Sessions that keep up with speech."""
        return int(_SPEED_SHARE * self.video_s / self.block_s)

    @property
    def by_memory(self) -> int:
        """Sessions that have room."""
        return 1 + int(_MEMORY_SHARE * self.free_bytes / max(1, self.session_bytes))


def measure(session: AvatarSession, weights_bytes: int, blocks: int = 5, rounds: int = 3) -> Budget:
    """Streams silence through a warm session: what a session costs.

    Args:
        session: the session.
        weights_bytes: of its networks, which further sessions share.
        blocks: of a round.
        rounds: whose median counts, since machines stumble.
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
    """Sessions that are compiled and warm, each for one client at a time."""

    def __init__(
        self,
        build: Callable[[AvatarModel | None], AvatarSession],
        *,
        most: int,
    ):
        """Remembers how to build a session; `open` does it.

        Args:
            build: makes a session, with the weights of an earlier one if there is one.
            most: sessions at once, whatever would fit.
        """
        self._build, self._most = build, most
        self.dispatch = ThreadPoolExecutor(1, thread_name_prefix="dispatch")
        self._free: list[AvatarSession] = []
        self.budget: Budget | None = None
        self.count = 0
        self.model: AvatarModel | None = None
        self.size: tuple[int, int] | None = None  # height and width of frames

    @property
    def is_ready(self) -> bool:
        """True if sessions can begin."""
        return self.budget is not None and self.count > 0

    @property
    def free(self) -> int:
        """Number of free seats."""
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
        """A free seat, or None."""
        return self._free.pop() if self._free else None

    def give_back(self, session: AvatarSession) -> None:
        """Frees a seat; the session must not be used afterwards."""
        self._free.append(session)

    async def prepare(self, session: AvatarSession, portrait: np.ndarray, text: Any) -> None:
        """SessionPool a portrait."""
        loop = asyncio.get_running_loop()
        await loop.run_in_executor(self.dispatch, lambda: session.reset(portrait, text=text))

    def close(self) -> None:
        """Ends the worker."""
        self.dispatch.shutdown(wait=False, cancel_futures=True)


def _free_bytes() -> int:
    """Free memory where streams live."""
    stats = jax.devices()[0].memory_stats() or {}
    if "bytes_limit" in stats:
        return stats["bytes_limit"] - stats.get("bytes_in_use", 0)
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")

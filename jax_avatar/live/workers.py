"""Workers of a live session: two threads that wait for the devices, two tasks that feed them."""

import asyncio
from collections.abc import Callable, Coroutine
from concurrent.futures import Executor, ThreadPoolExecutor
from typing import Any

__all__ = ["Workers"]


class Workers:
    """A thread that hands blocks to the devices, and one that waits for their frames."""

    def __init__(self, dispatch: Executor | None = None, fetching: Executor | None = None):
        """Starts nothing yet.

        Args:
            dispatch: of one thread, hands blocks over; sessions on the same devices must share it.
                The session's own if not given.
            fetching: of one thread, waits for frames; the session's own if not given.
        """
        self._own = []
        self._dispatch = dispatch or self._make("avatar")
        self._fetching = fetching or self._make("frames")
        self._tasks: list[asyncio.Task] = []
        self.is_closed = False

    def _make(self, name: str) -> Executor:
        self._own.append(ThreadPoolExecutor(1, thread_name_prefix=name))
        return self._own[-1]

    def start(self, *tasks: Coroutine[Any, Any, Any], on_end: Callable[[], None]) -> None:
        """Runs coroutines until `close`; calls `on_end` if one ends before."""
        self._tasks = [asyncio.get_running_loop().create_task(task) for task in tasks]
        for task in self._tasks:
            task.add_done_callback(lambda _: on_end())

    async def dispatch(self, function: Callable, *arguments: Any) -> Any:
        """Result of a function, called in the thread that hands blocks over."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._dispatch, function, *arguments)

    async def fetch(self, function: Callable, *arguments: Any) -> Any:
        """Result of a function, called in the thread that waits for frames."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._fetching, function, *arguments)

    def raise_failure(self) -> None:
        """Raises what a task has raised."""
        for task in self._tasks:
            if task.done() and not task.cancelled() and (error := task.exception()):
                raise error

    async def close(self) -> None:
        """Cancels the tasks; returns when no thread uses the devices any more."""
        self.is_closed = True
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        # A thread cannot be cancelled: a call after its last one returns when that has ended.
        await self.dispatch(lambda: None)
        await self.fetch(lambda: None)
        for executor in self._own:
            executor.shutdown()

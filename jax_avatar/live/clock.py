"""Clock of a live session; tests put another in its place."""

import asyncio
import contextlib
import time

__all__ = ["Clock"]


class Clock:
    """Monotonic seconds, and waiting for them to pass."""

    def now(self) -> float:
        """Seconds since an arbitrary moment."""
        return time.monotonic()

    async def wait(self, signal: asyncio.Event, seconds: float) -> None:
        """Waits until the signal is set or the time has passed, then clears the signal."""
        # Not `wait_for`: before Python 3.12 it loses a cancellation that comes with the signal.
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await signal.wait()
        signal.clear()

"""Concurrent tasks that end together."""

import asyncio
from collections.abc import Coroutine
from typing import Any

__all__ = ["until_first_ends"]


async def until_first_ends(*coroutines: Coroutine[Any, Any, Any]) -> None:
    """Runs coroutines until the first ends, then cancels the others; raises its exception."""
    tasks = [asyncio.create_task(coroutine) for coroutine in coroutines]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

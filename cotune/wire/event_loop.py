"""The event loop of all our processes: uvloop where it is installed, which halves the cost of a small message."""

from __future__ import annotations

import asyncio
import importlib.util
from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


def make_runner() -> asyncio.Runner:
    """A runner with the fastest loop there is; close it, or use it as a context manager."""
    if importlib.util.find_spec("uvloop") is None:
        return asyncio.Runner()
    import uvloop

    return asyncio.Runner(loop_factory=uvloop.new_event_loop)


def run_coroutine(work: Coroutine[Any, Any, T]) -> T:
    """As `asyncio.run`, on that loop.

    Example:
        >>> async def answer() -> int:
        ...     return 42
        >>> run_coroutine(answer())
        42
    """
    with make_runner() as runner:
        return runner.run(work)

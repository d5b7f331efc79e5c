"""The event loop of all our processes: uvloop where it is installed, which halves the cost of a small message."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import signal
from collections.abc import Callable, Coroutine, Iterator
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


@contextlib.contextmanager
def asked_to_end(handle: Callable[[], None]) -> Iterator[None]:
    """Within it SIGINT and SIGTERM call `handle` in the running loop and do nothing else.

    Only the main thread of a process may handle signals; in another one, and where the system knows none, nothing is
    changed, and there has to be another way to ask.
    """
    loop = asyncio.get_running_loop()
    handled: list[int] = []
    for number in (signal.SIGINT, signal.SIGTERM):
        with contextlib.suppress(NotImplementedError, RuntimeError, ValueError):
            loop.add_signal_handler(number, handle)
            handled.append(number)
    try:
        yield
    finally:
        for taken in handled:
            loop.remove_signal_handler(taken)

"""Server-sent events, and work that ends when the client hangs up."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Coroutine
from typing import Any, TypeVar

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

T = TypeVar("T")

DONE = b"data: [DONE]\n\n"
"""The last event of a stream."""

SEND_TIMEOUT_S = 60.0


class ClientGoneError(Exception):
    """The client hung up; nobody is there for an answer."""


def event(value: object) -> bytes:
    """One event with a JSON value.

    Example:
        >>> event({"a": 1})
        b'data: {"a":1}\\n\\n'
    """
    # JSON puts no line break into a value, so that one `data:` line holds it.
    return b"data: " + json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode() + b"\n\n"


async def until_disconnect(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`, which is cancelled when the client hangs up.

    Args:
        receive: of the request, whose body is read.
        work: what to do.

    Raises:
        ClientGoneError: the client hung up first.
    """
    task = asyncio.create_task(work)
    watcher = asyncio.create_task(_disconnect(receive))
    try:
        await asyncio.wait({task, watcher}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGoneError
        return task.result()
    finally:
        for each in (task, watcher):
            each.cancel()
        # Not a time-out: cancelled work ends by itself, and its resources are free only then.
        await asyncio.gather(task, watcher, return_exceptions=True)


async def _disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStream(Response):
    """An answer whose events are sent as they come, and whose source is closed in any case.

    Args:
        events: encoded events; closed when all are sent, or the client hangs up or takes none for too long.
        send_timeout_s: how long the client may take none, seconds.
    """

    media_type = "text/event-stream"

    def __init__(self, events: AsyncGenerator[bytes, None], *, send_timeout_s: float = SEND_TIMEOUT_S) -> None:
        # A proxy that collected the events would take the streaming away.
        super().__init__(headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._events = events
        self._send_timeout_s = send_timeout_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await until_disconnect(receive, self._send_all(send))
        except (ClientGoneError, TimeoutError):
            return
        finally:
            await self._events.aclose()

    async def _send_all(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        async for chunk in self._events:
            async with asyncio.timeout(self._send_timeout_s):
                await send({"type": "http.response.body", "body": chunk, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})

"""What is to be sent on one connection, in order, by a task of its own, so that nobody who computes has to wait."""

from __future__ import annotations

import asyncio
import logging
from collections import deque

from cotune.errors import InputError, WireError
from cotune.wire.transport import Connection

logger = logging.getLogger("cotune.wire")


class Outbox:
    """Sends messages in the order of `put`, until it is closed or the connection breaks.

    Args:
        connection: where to.
        full_bytes: with so many waiting bytes the outbox is full; `put` still accepts, it is for the sender to stop.
        timeout_s: a reader who takes no message for so long is hung up on.

    Example:
        >>> outbox = Outbox(connection, full_bytes=2**20, timeout_s=30.0)  # doctest: +SKIP
        >>> outbox.put(encode(frame))                                      # doctest: +SKIP
    """

    def __init__(self, connection: Connection, *, full_bytes: int = 2**20, timeout_s: float = 30.0) -> None:
        if full_bytes < 1 or timeout_s <= 0:
            raise InputError(f"full_bytes is {full_bytes} and timeout_s {timeout_s}, expected numbers above 0")
        self._connection = connection
        self._full_bytes = full_bytes
        self._timeout_s = timeout_s
        self._waiting: deque[bytes] = deque()
        self._num_bytes = 0
        self._news = asyncio.Event()
        self._emptied = asyncio.Event()
        self._emptied.set()
        self._task = asyncio.create_task(self._send_all())
        self.on_room = _nothing
        """Called when the outbox was full and is so no longer."""

    @property
    def is_full(self) -> bool:
        """Whether its reader cannot keep up."""
        return self._num_bytes >= self._full_bytes

    def put(self, data: bytes) -> None:
        """Send `data` after what is there already; it is dropped where the connection is over."""
        if self._task.done():
            return
        self._waiting.append(data)
        self._num_bytes += len(data)
        self._emptied.clear()
        self._news.set()

    async def flush(self) -> None:
        """Wait until everything is sent, or the connection is over."""
        emptied = asyncio.ensure_future(self._emptied.wait())
        await asyncio.wait({emptied, self._task}, return_when=asyncio.FIRST_COMPLETED)
        emptied.cancel()

    async def close(self) -> None:
        """Stop sending; what waits is lost."""
        self._task.cancel()
        await asyncio.wait({self._task})

    async def _send_all(self) -> None:
        try:
            while True:
                while self._waiting:
                    data = self._waiting[0]
                    async with asyncio.timeout(self._timeout_s):
                        await self._connection.send(data)
                    was_full = self.is_full
                    self._waiting.popleft()
                    self._num_bytes -= len(data)
                    if was_full and not self.is_full:
                        self.on_room()
                self._emptied.set()
                self._news.clear()
                await self._news.wait()
        except TimeoutError:
            logger.info("a reader took nothing for %g s; hung up", self._timeout_s)
            await self._connection.close()
        except WireError as error:
            # Who receives on this connection notices too.
            logger.debug("an outbox ended: %s", error)


def _nothing() -> None:
    return

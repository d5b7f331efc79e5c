"""Two connected ends in one event loop: the transport of tests and of single-process runs."""

from __future__ import annotations

import asyncio
from collections import deque

from cotune.errors import ConnectionLostError, WireTimeoutError
from cotune.wire.transport import Connection, Traffic, check_size

CAPACITY = 1024


class _Way:
    """One direction: a bounded queue that remembers that it was closed."""

    def __init__(self) -> None:
        self.frames: deque[bytes] = deque()
        self.closed = False
        self.readable = asyncio.Event()
        self.writable = asyncio.Event()

    def close(self) -> None:
        self.closed = True
        self.readable.set()
        self.writable.set()

    async def put(self, data: bytes) -> None:
        while len(self.frames) >= CAPACITY and not self.closed:
            self.writable.clear()
            await self.writable.wait()
        if self.closed:
            raise ConnectionLostError("the connection is closed; open a new one to go on")
        self.frames.append(data)
        self.readable.set()

    async def get(self, timeout_s: float) -> bytes:
        if not self.frames:
            await self._wait(timeout_s)
        data = self.frames.popleft()
        self.writable.set()
        return data

    async def _wait(self, timeout_s: float) -> None:
        try:
            async with asyncio.timeout(timeout_s):
                while not self.frames:
                    if self.closed:
                        raise ConnectionLostError("the connection is closed; open a new one to go on")
                    self.readable.clear()
                    await self.readable.wait()
        except TimeoutError:
            raise WireTimeoutError(f"nothing came within {timeout_s:g} s") from None


class InProcessConnection(Traffic):
    """One end of a pair; see `cotune.wire.transport.Connection`."""

    def __init__(self, outgoing: _Way, incoming: _Way) -> None:
        super().__init__()
        self._outgoing = outgoing
        self._incoming = incoming

    @property
    def closed(self) -> bool:
        return self._outgoing.closed

    async def send(self, data: bytes) -> None:
        check_size(data)
        data = bytes(data)
        await self._outgoing.put(data)
        self.sent(data)
        await asyncio.sleep(0)  # so that a sender in a loop lets its receiver run

    async def receive(self, timeout_s: float) -> bytes:
        data = await self._incoming.get(timeout_s)
        self.received(data)
        return data

    async def close(self) -> None:
        self._outgoing.close()
        self._incoming.close()


def connection_pair() -> tuple[Connection, Connection]:
    """Two ends: what one sends the other receives."""
    there, back = _Way(), _Way()
    return InProcessConnection(there, back), InProcessConnection(back, there)

"""One connection between a device and a cloud, whatever carries it: messages in order, both ways, counted.

`cotune.wire.inprocess` and `cotune.wire.websocket` make connections; `cotune.wire.emulator`, `recorder` and
`ledgered` wrap any of them. A connection belongs to one event loop; one task at a time receives from it.
"""

from __future__ import annotations

from typing import Protocol

from cotune.errors import FrameError
from cotune.wire.frames import MAX_FRAME_BYTES


class Connection(Protocol):
    """A two-way stream of messages. Counters count the bytes of messages, not the framing below them."""

    @property
    def closed(self) -> bool:
        """Either side closed it, or it broke. What came before may still be received."""
        ...

    @property
    def bytes_sent(self) -> int: ...

    @property
    def bytes_received(self) -> int: ...

    @property
    def frames_sent(self) -> int: ...

    @property
    def frames_received(self) -> int: ...

    async def send(self, data: bytes) -> None:
        """Hand over one message; waits while the way is full.

        Raises:
            FrameError: larger than `MAX_FRAME_BYTES`; nothing is sent.
            ConnectionLostError: the connection is closed or broke.
        """
        ...

    async def receive(self, timeout_s: float) -> bytes:
        """The next message.

        Raises:
            WireTimeoutError: nothing came within `timeout_s` seconds; the connection stays usable.
            ConnectionLostError: the connection is closed or broke, and everything that came was received.
        """
        ...

    async def close(self) -> None:
        """Close both ways. Closing twice is fine; it never raises."""
        ...


class Traffic:
    """The counters of one connection."""

    def __init__(self) -> None:
        self.bytes_sent = 0
        self.bytes_received = 0
        self.frames_sent = 0
        self.frames_received = 0

    def sent(self, data: bytes) -> None:
        """Count one message that goes out."""
        self.bytes_sent += len(data)
        self.frames_sent += 1

    def received(self, data: bytes) -> None:
        """Count one message that came in."""
        self.bytes_received += len(data)
        self.frames_received += 1


class ConnectionWrapper:
    """A connection that does what `connection` does; its subclasses change one thing about it."""

    def __init__(self, connection: Connection) -> None:
        self.connection = connection

    @property
    def closed(self) -> bool:
        return self.connection.closed

    @property
    def bytes_sent(self) -> int:
        return self.connection.bytes_sent

    @property
    def bytes_received(self) -> int:
        return self.connection.bytes_received

    @property
    def frames_sent(self) -> int:
        return self.connection.frames_sent

    @property
    def frames_received(self) -> int:
        return self.connection.frames_received

    async def send(self, data: bytes) -> None:
        await self.connection.send(data)

    async def receive(self, timeout_s: float) -> bytes:
        return await self.connection.receive(timeout_s)

    async def close(self) -> None:
        await self.connection.close()


def check_size(data: bytes) -> None:
    """Refuse a message that no side would accept."""
    if len(data) > MAX_FRAME_BYTES:
        raise FrameError(f"a frame of {len(data)} bytes was to be sent, expected at most {MAX_FRAME_BYTES}")

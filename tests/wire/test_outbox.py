"""An outbox keeps the order, says when it is full, and lets go of readers that take nothing."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from cotune.errors import ConnectionLostError, InputError
from cotune.wire.outbox import Outbox
from cotune.wire.transport import Connection, Traffic

PATIENCE_S = 5.0


class Reader(Traffic):
    """A connection whose other end takes a message only when it is told to."""

    def __init__(self, num_taken: int = 0) -> None:
        super().__init__()
        self.got: list[bytes] = []
        self.closed = False
        self._may_take = asyncio.Semaphore(num_taken)
        self._error: Exception | None = None

    def take(self, count: int = 1) -> None:
        for _ in range(count):
            self._may_take.release()

    def fail(self, error: Exception) -> None:
        self._error = error
        self.take()

    async def send(self, data: bytes) -> None:
        await self._may_take.acquire()
        if self._error is not None:
            raise self._error
        self.got.append(data)

    async def receive(self, timeout_s: float) -> bytes:
        raise AssertionError("an outbox only sends")

    async def close(self) -> None:
        self.closed = True


@asynccontextmanager
async def outbox_to(connection: Connection, *, full_bytes: int = 10, timeout_s: float = 5.0) -> AsyncIterator[Outbox]:
    outbox = Outbox(connection, full_bytes=full_bytes, timeout_s=timeout_s)
    try:
        async with asyncio.timeout(PATIENCE_S):
            yield outbox
    finally:
        await outbox.close()


async def test_messages_go_out_in_the_order_they_were_put_in() -> None:
    reader = Reader(num_taken=100)
    async with outbox_to(reader) as outbox:
        messages = [bytes([i]) for i in range(20)]
        for message in messages[:7]:
            outbox.put(message)
        await outbox.flush()
        assert reader.got == messages[:7]
        for message in messages[7:]:
            outbox.put(message)
            await asyncio.sleep(0)
        await outbox.flush()
        assert reader.got == messages


async def test_put_never_waits_and_full_is_said_once_it_has_room_again() -> None:
    reader = Reader()
    async with outbox_to(reader, full_bytes=10) as outbox:
        rooms: list[int] = []
        outbox.on_room = lambda: rooms.append(len(reader.got))
        for _ in range(2):
            outbox.put(bytes(4))
        assert not outbox.is_full
        outbox.put(bytes(4))
        outbox.put(bytes(4))
        assert outbox.is_full
        for count in range(1, 5):
            reader.take()
            while len(reader.got) < count:
                await asyncio.sleep(0)
        await outbox.flush()
        assert not outbox.is_full
        # 16, 12, 8 bytes waiting: it has room once two are taken, and says so once.
        assert rooms == [2]


async def test_a_reader_who_takes_nothing_is_hung_up_on() -> None:
    reader = Reader()
    async with outbox_to(reader, timeout_s=0.02) as outbox:
        outbox.put(b"1st")
        outbox.put(b"2nd")
        await outbox.flush()
        assert reader.closed
        assert reader.got == []
        outbox.put(bytes(100))
        assert not outbox.is_full


async def test_a_slow_reader_who_takes_something_in_time_is_kept() -> None:
    reader = Reader()
    async with outbox_to(reader, timeout_s=0.2) as outbox:
        for i in range(4):
            outbox.put(bytes([i]))
        for _ in range(4):
            await asyncio.sleep(0.08)
            reader.take()
        await outbox.flush()
        assert len(reader.got) == 4
        assert not reader.closed


async def test_flush_waits_for_what_is_there() -> None:
    reader = Reader()
    async with outbox_to(reader) as outbox:
        await outbox.flush()
        outbox.put(b"x")
        flushing = asyncio.create_task(outbox.flush())
        await asyncio.sleep(0.01)
        assert not flushing.done()
        reader.take()
        await flushing
        assert reader.got == [b"x"]


async def test_a_broken_connection_ends_it_quietly() -> None:
    reader = Reader()
    async with outbox_to(reader) as outbox:
        outbox.put(bytes(20))
        outbox.put(b"y")
        reader.fail(ConnectionLostError("gone"))
        await outbox.flush()
        before = outbox.is_full
        outbox.put(b"z")
        assert outbox.is_full == before
        await outbox.flush()
        assert reader.got == []


async def test_close_drops_what_waits() -> None:
    reader = Reader()
    async with outbox_to(reader) as outbox:
        outbox.put(b"x")
        await asyncio.sleep(0)
        await outbox.close()
        reader.take()
        await asyncio.sleep(0)
        assert reader.got == []
        outbox.put(b"y")
        await outbox.flush()
        await outbox.close()


@pytest.mark.parametrize("limits", [{"full_bytes": 0}, {"timeout_s": 0.0}])
async def test_limits_are_above_zero(limits: dict[str, float]) -> None:
    with pytest.raises(InputError, match="expected numbers above 0"):
        Outbox(Reader(), **limits)  # type: ignore[arg-type]

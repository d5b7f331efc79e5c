"""The in-process pair, and with it what every connection promises."""

from __future__ import annotations

import asyncio

import pytest

from cotune.errors import ConnectionLostError, FrameError, WireTimeoutError
from cotune.wire.frames import MAX_FRAME_BYTES
from cotune.wire.inprocess import CAPACITY, connection_pair


async def test_messages_come_in_order_and_are_counted() -> None:
    a, b = connection_pair()
    for data in (b"one", b"", b"three"):
        await a.send(data)
    assert [await b.receive(1) for _ in range(3)] == [b"one", b"", b"three"]
    await b.send(b"back")
    assert await a.receive(1) == b"back"
    assert (a.frames_sent, a.bytes_sent, a.frames_received, a.bytes_received) == (3, 8, 1, 4)
    assert (b.frames_sent, b.bytes_sent, b.frames_received, b.bytes_received) == (1, 4, 3, 8)


async def test_a_waiting_receiver_is_woken() -> None:
    a, b = connection_pair()
    waiting = asyncio.create_task(b.receive(5))
    await asyncio.sleep(0)
    await a.send(b"x")
    assert await waiting == b"x"


async def test_a_timeout_leaves_the_connection_usable() -> None:
    a, b = connection_pair()
    with pytest.raises(WireTimeoutError, match=r"within 0\.01 s"):
        await b.receive(0.01)
    await a.send(b"x")
    assert await b.receive(0) == b"x"


async def test_what_came_before_the_close_is_received() -> None:
    a, b = connection_pair()
    await a.send(b"last")
    await a.close()
    await a.close()
    assert a.closed and b.closed
    assert await b.receive(1) == b"last"
    for broken in (b.receive(1), b.send(b"x"), a.send(b"x"), a.receive(1)):
        with pytest.raises(ConnectionLostError, match="open a new one"):
            await broken


async def test_closing_wakes_a_receiver_and_a_sender() -> None:
    a, b = connection_pair()
    receiver = asyncio.create_task(a.receive(5))
    for _ in range(CAPACITY):
        await a.send(b"x")
    sender = asyncio.create_task(a.send(b"one too many"))
    await asyncio.sleep(0)
    assert not receiver.done() and not sender.done()
    await b.close()
    for task in (receiver, sender):
        with pytest.raises(ConnectionLostError):
            await task


async def test_a_full_way_makes_the_sender_wait() -> None:
    a, b = connection_pair()
    for _ in range(CAPACITY):
        await a.send(b"x")
    sender = asyncio.create_task(a.send(b"late"))
    await asyncio.sleep(0)
    assert not sender.done()
    await b.receive(1)
    await sender


async def test_oversized_messages_are_refused_by_the_sender() -> None:
    a, b = connection_pair()
    with pytest.raises(FrameError, match="expected at most"):
        await a.send(bytes(MAX_FRAME_BYTES + 1))
    with pytest.raises(WireTimeoutError):
        await b.receive(0)


async def test_received_bytes_do_not_alias_what_was_sent() -> None:
    a, b = connection_pair()
    buffer = bytearray(b"abc")
    await a.send(buffer)  # type: ignore[arg-type]
    buffer[:] = b"xyz"
    assert await b.receive(1) == b"abc"

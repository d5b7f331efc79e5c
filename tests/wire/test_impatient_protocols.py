"""Peers that take too long, or too much, over real sockets: each is hung up on."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest

from cotune.wire import impatient_protocols
from cotune.wire.asgi_server import ServerConfig, run_server
from cotune.wire.impatient_protocols import MAX_FRAGMENTS, Patience

pytestmark = pytest.mark.integration

UPGRADE = (
    b"GET / HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n"
)
Application = Callable[..., Awaitable[None]]


@asynccontextmanager
async def running(application: Application, **patience: float) -> AsyncIterator[int]:
    """The port of a server that is not patient."""
    stop, ready = asyncio.Event(), asyncio.get_running_loop().create_future()
    config = ServerConfig(with_websockets=True, grace_s=1, patience=Patience(**{"head_s": 0.3, **patience}))
    task = asyncio.create_task(run_server(application, config, on_ready=ready.set_result, stop=stop))
    try:
        yield await asyncio.wait_for(ready, 5)
    finally:
        stop.set()
        await asyncio.wait_for(task, 10)


async def hello(scope: Any, receive: Any, send: Any) -> None:
    """Answers requests, and echoes over WebSockets."""
    if scope["type"] == "http":
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
        await send({"type": "http.response.body", "body": b"ok"})
        return
    await receive()
    await send({"type": "websocket.accept"})
    while (message := await receive())["type"] == "websocket.receive":
        await send({"type": "websocket.send", "bytes": message["bytes"]})


class Endless:
    """Says something until it is hung up on."""

    def __init__(self) -> None:
        self.over = asyncio.Event()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        try:
            if scope["type"] == "http":
                await send({"type": "http.response.start", "status": 200, "headers": []})
                while True:
                    await send({"type": "http.response.body", "body": bytes(60_000), "more_body": True})
                    if asyncio.current_task() is None or await self._is_gone(receive):
                        return
            await receive()
            await send({"type": "websocket.accept"})
            while True:
                await send({"type": "websocket.send", "bytes": bytes(60_000)})
        finally:
            self.over.set()

    async def _is_gone(self, receive: Any) -> bool:
        try:
            async with asyncio.timeout(0.001):
                return bool((await receive())["type"] == "http.disconnect")
        except TimeoutError:
            return False


async def is_cut(reader: asyncio.StreamReader, timeout_s: float = 5.0) -> bool:
    """Whether the other side hangs up in time; what still comes is thrown away."""
    with contextlib.suppress(ConnectionError):
        async with asyncio.timeout(timeout_s):
            while await reader.read(65_536):
                pass
    return True


async def dial(port: int, data: bytes = b"") -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(data)
    return reader, writer


async def hang_up(writer: asyncio.StreamWriter) -> None:
    writer.transport.abort()
    with contextlib.suppress(ConnectionError):
        await writer.wait_closed()


def frame(opcode: int, payload: bytes = b"", *, final: bool = True) -> bytes:
    """A client's WebSocket frame, short enough for one byte of length."""
    return struct.pack("!BB", opcode | (0x80 if final else 0), 0x80 | len(payload)) + bytes(4) + payload


@pytest.mark.parametrize("start", [b"", b"GET / HT", b"GET / HTTP/1.1\r\nHost: x\r\n"])
async def test_a_head_that_comes_byte_by_byte_is_cut(start: bytes) -> None:
    async with running(hello) as port:
        reader, writer = await dial(port, start)

        async def drip() -> None:
            with contextlib.suppress(ConnectionError):
                while True:
                    writer.write(b"x")
                    await writer.drain()
                    await asyncio.sleep(0.05)

        dripping = asyncio.create_task(drip())
        started_s = asyncio.get_running_loop().time()
        assert await is_cut(reader)
        assert 0.25 <= asyncio.get_running_loop().time() - started_s < 2
        dripping.cancel()
        await asyncio.gather(dripping, return_exceptions=True)
        await hang_up(writer)


async def test_requests_on_one_connection_may_come_one_after_the_other_but_not_too_late() -> None:
    async with running(hello) as port:
        reader, writer = await dial(port)
        for _ in range(3):
            await asyncio.sleep(0.15)
            writer.write(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
            assert (await asyncio.wait_for(reader.readuntil(b"ok"), 5)).startswith(b"HTTP/1.1 200")
        assert await is_cut(reader)
        await hang_up(writer)


async def test_a_body_that_never_comes_keeps_nothing_once_the_answer_is_out() -> None:
    async with running(hello) as port:
        reader, writer = await dial(port, b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 999\r\n\r\n")
        assert await is_cut(reader)
        await hang_up(writer)


@pytest.mark.parametrize(
    "header", [b"X: " + b"y" * 20_000, b"\r\n".join(b"X: y" for _ in range(300)), b"Sec-WebSocket-Key: again"]
)
async def test_a_handshake_that_the_websocket_does_not_take_is_cut(header: bytes) -> None:
    """uvicorn's HTTP side lets longer and more headers pass than its WebSocket side."""
    async with running(hello) as port:
        reader, writer = await dial(port, UPGRADE + header + b"\r\n\r\n")
        assert await is_cut(reader)
        await hang_up(writer)


def small_pipe(port: int) -> socket.socket:
    """A connection whose buffers are full soon."""
    one = socket.socket()
    one.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    one.connect(("127.0.0.1", port))
    one.setblocking(False)
    return one


@pytest.mark.parametrize("head", [b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", UPGRADE + b"\r\n"])
async def test_a_reader_of_one_byte_now_and_then_is_cut(head: bytes) -> None:
    application = Endless()
    async with running(application, stalled_s=0.4) as port:
        with small_pipe(port) as one:
            one.send(head)

            async def sip() -> None:
                while True:
                    with contextlib.suppress(BlockingIOError, ConnectionError):
                        one.recv(1)
                    await asyncio.sleep(0.05)

            sipping = asyncio.create_task(sip())
            await asyncio.wait_for(application.over.wait(), 10)
            sipping.cancel()
            await asyncio.gather(sipping, return_exceptions=True)


async def test_a_closed_connection_is_gone_although_nobody_reads_its_last_bytes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(impatient_protocols, "LINGER_S", 0.3)
    connections: list[Any] = []

    async def say_much_and_leave(scope: Any, receive: Any, send: Any) -> None:
        connections.append(send.__self__)
        await receive()
        await send({"type": "websocket.accept"})
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(0.5):
                while True:
                    await send({"type": "websocket.send", "bytes": bytes(50_000)})

    async with running(say_much_and_leave) as port:
        with small_pipe(port) as one:
            one.send(UPGRADE + b"\r\n")
            async with asyncio.timeout(5):
                while not connections or not connections[0].disconnected:
                    await asyncio.sleep(0.02)


async def test_pings_whose_pongs_nobody_reads_are_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(impatient_protocols, "MAX_BUFFER_BYTES", 100_000)
    most = 0

    async def listen(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        await send({"type": "websocket.accept"})
        transport = send.__self__.transport
        lost = asyncio.create_task(receive())
        nonlocal most
        while not lost.done():
            most = max(most, transport.get_write_buffer_size())
            await asyncio.sleep(0.001)

    async with running(listen) as port:
        with small_pipe(port) as one:
            one.send(UPGRADE + b"\r\n")
            pings = frame(9, bytes(125)) * 200
            with pytest.raises(ConnectionError):
                async with asyncio.timeout(10):
                    while True:
                        with contextlib.suppress(BlockingIOError):
                            one.send(pings)
                        await asyncio.sleep(0)
    assert 0 < most < 2_000_000


async def test_a_server_ends_while_a_peer_that_hung_up_has_not_read_all() -> None:
    with contextlib.ExitStack() as after_the_server:
        async with running(Endless()) as port:
            one = after_the_server.enter_context(small_pipe(port))
            one.send(UPGRADE + b"\r\n")
            await asyncio.sleep(0.2)  # until its buffer is full
            one.send(frame(8, struct.pack("!H", 1000)))
            await asyncio.sleep(0.2)


async def test_a_message_of_endlessly_many_empty_pieces_is_cut() -> None:
    async with running(hello) as port:
        reader, writer = await dial(port, UPGRADE + b"\r\n")
        await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 5)
        writer.write(frame(2, b"x", final=False) + frame(0, final=False) * (MAX_FRAGMENTS - 2) + frame(0, b"y"))
        assert await asyncio.wait_for(reader.readexactly(4), 5) == b"\x82\x02xy"
        writer.write(frame(2, final=False) + frame(0, final=False) * (MAX_FRAGMENTS + 1))
        answer = await asyncio.wait_for(reader.read(100), 5)
        assert answer[0] == 0x88 and answer[2:4] == struct.pack("!H", 1009)
        assert await is_cut(reader)
        await hang_up(writer)


async def test_a_connection_that_behaves_outlives_all_deadlines() -> None:
    async with running(hello, stalled_s=0.2) as port:
        reader, writer = await dial(port, UPGRADE + b"\r\n")
        await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 5)
        for _ in range(4):
            await asyncio.sleep(0.2)
            writer.write(frame(2, b"abc"))
            assert await asyncio.wait_for(reader.readexactly(5), 5) == b"\x82\x03abc"
        await hang_up(writer)

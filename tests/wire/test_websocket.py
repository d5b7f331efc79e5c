"""Real WebSockets on loopback: plain and TLS, tokens, limits, and everything that can go wrong when connecting."""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass
from pathlib import Path

import pytest
import trustme
from clouds import fronted
from toy import toy_model
from websockets.asyncio.client import connect as raw_connect
from websockets.asyncio.server import ServerConnection
from websockets.asyncio.server import serve as raw_serve
from websockets.exceptions import InvalidStatus

from cotune.cloud.front import FrontConfig
from cotune.cloud.service import CloudService
from cotune.errors import (
    ConnectionLostError,
    CotuneError,
    FrameError,
    InputError,
    RefusedError,
    WireError,
    WireTimeoutError,
)
from cotune.openai_api.bearer import BearerTokens
from cotune.wire.codes import ErrorCode
from cotune.wire.frame import MAX_FRAME_BYTES
from cotune.wire.transport import Connection
from cotune.wire.websocket import WebSocketConnection, connect, is_loopback

pytestmark = pytest.mark.integration

TOKEN = "a-token-that-nobody-guesses"
Handler = Callable[[Connection], Awaitable[None]]


async def echo(connection: Connection) -> None:
    while True:
        await connection.send(await connection.receive(30))


class HandledService(CloudService):
    """Does with connections what the test says, in place of answering devices."""

    def __init__(self, handler: Handler) -> None:
        super().__init__(toy_model())
        self._handler = handler
        self.num_handled = 0

    async def handle(self, connection: Connection, owner: str = "") -> None:
        self.num_handled += 1
        try:
            with suppress(CotuneError):
                await self._handler(connection)
        finally:
            self.num_handled -= 1
            await connection.close()


@dataclass(frozen=True)
class Cloud:
    """A cloud's front at work."""

    url: str
    service: HandledService
    running: AsyncExitStack

    @property
    def port(self) -> int:
        return int(self.url.rpartition(":")[2])


Start = Callable[..., Awaitable[Cloud]]


@pytest.fixture
async def start() -> AsyncIterator[Start]:
    """Puts a handler behind the cloud's own front until the test ends; no task may be left then."""
    async with AsyncExitStack() as all_running:

        async def started(
            handler: Handler = echo,
            *,
            tokens: Sequence[str] | None = None,
            max_connections: int = 8,
            **server: object,
        ) -> Cloud:
            service, running = HandledService(handler), AsyncExitStack()
            config = FrontConfig(
                tokens=None if tokens is None else BearerTokens(tokens), max_connections=max_connections
            )
            url = await running.enter_async_context(fronted(service, config, **server))
            all_running.push_async_callback(running.aclose)
            return Cloud(url, service, running)

        before = asyncio.all_tasks()
        yield started
    for _ in range(100):  # transports close in callbacks after their connections
        left = asyncio.all_tasks() - before - {asyncio.current_task()}
        if not left:
            break
        await asyncio.sleep(0.01)
    assert not left


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("tls")
    authority = trustme.CA()
    issued = authority.issue_cert("localhost", "127.0.0.1")
    paths = {name: folder / f"{name}.pem" for name in ("ca", "cert", "key")}
    authority.cert_pem.write_to_path(paths["ca"])
    issued.private_key_pem.write_to_path(paths["key"])
    issued.cert_chain_pems[0].write_to_path(paths["cert"])
    return paths


async def http_get(server: Cloud, path: str, *headers: str) -> bytes:
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    lines = (f"GET {path} HTTP/1.1", "Host: localhost", "Connection: close", *headers, "", "")
    writer.write("\r\n".join(lines).encode())
    answer = await asyncio.wait_for(reader.read(), 5)
    writer.close()
    await writer.wait_closed()
    return answer


async def test_echo_with_counters(start: Start) -> None:
    server = await start()
    assert server.url == f"ws://127.0.0.1:{server.port}"
    client = await connect(server.url)
    for data in (b"", b"abc", bytes(MAX_FRAME_BYTES)):
        await client.send(data)
        assert await client.receive(5) == data
    assert client.bytes_sent == client.bytes_received == 3 + MAX_FRAME_BYTES
    assert client.frames_sent == client.frames_received == 3
    assert server.service.num_handled == 1
    assert not client.closed
    await client.close()
    await client.close()
    assert client.closed
    for broken in (client.send(b"x"), client.receive(1)):
        with pytest.raises(ConnectionLostError, match="connect again"):
            await broken


async def test_nagle_is_off_and_nothing_is_compressed(start: Start) -> None:
    client = await connect((await start()).url)
    assert isinstance(client, WebSocketConnection)
    transport = client._websocket.transport
    assert transport.get_extra_info("socket").getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
    assert client._websocket.protocol.extensions == []
    await client.close()


async def test_a_timeout_leaves_the_connection_usable(start: Start) -> None:
    client = await connect((await start()).url)
    with pytest.raises(WireTimeoutError, match=r"within 0\.02 s"):
        await client.receive(0.02)
    await client.send(b"x")
    assert await client.receive(5) == b"x"
    await client.close()


async def test_tls_with_a_token(start: Start, certificates: dict[str, Path]) -> None:
    server = await start(tls_cert=certificates["cert"], tls_key=certificates["key"], tokens=["other", TOKEN])
    assert server.url.startswith("wss://")
    client = await connect(server.url, token=TOKEN, tls_ca=certificates["ca"])
    await client.send(b"secret")
    assert await client.receive(5) == b"secret"
    await client.close()


async def test_a_certificate_that_is_not_trusted(start: Start, certificates: dict[str, Path]) -> None:
    server = await start(tls_cert=certificates["cert"], tls_key=certificates["key"])
    with pytest.raises(WireError, match=r"is not trusted: .*; give its CA as tls_ca"):
        await connect(server.url)


async def test_tls_on_one_side_only(start: Start, certificates: dict[str, Path]) -> None:
    secure = await start(tls_cert=certificates["cert"], tls_key=certificates["key"])
    with pytest.raises(WireError, match=f"ws://127.0.0.1:{secure.port}"):
        await connect(f"ws://127.0.0.1:{secure.port}")
    plain = await start()
    with pytest.raises(WireError, match=r"is it a ws:// address"):
        await connect(f"wss://127.0.0.1:{plain.port}", tls_ca=certificates["ca"])


@pytest.mark.parametrize("token", [None, "wrong", TOKEN + "x", TOKEN[:-1]])
async def test_wrong_tokens_are_refused(start: Start, token: str | None) -> None:
    server = await start(tokens=[TOKEN])
    with pytest.raises(RefusedError, match="does not accept the token") as caught:
        await connect(server.url, token=token)
    assert caught.value.code == ErrorCode.UNAUTHORISED
    assert TOKEN not in str(caught.value) and "wrong" not in str(caught.value)
    right = await connect(server.url, token=TOKEN)
    await right.close()


@pytest.mark.parametrize(
    "header", [f"Basic {TOKEN}", f"bearer{TOKEN}", "Bearer", "Bearer é", f"Bearer {TOKEN}\r\nAuthorization: x"]
)
async def test_other_authorisations_are_refused(start: Start, header: str) -> None:
    server = await start(tokens=[TOKEN])
    upgrade = (
        "Connection: Upgrade",
        "Upgrade: websocket",
        "Sec-WebSocket-Version: 13",
        "Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==",
    )
    for path, headers in (("/", upgrade), ("/metrics", ())):
        answer = await http_get(server, path, *headers, f"Authorization: {header}")
        assert answer.startswith((b"HTTP/1.1 401", b"HTTP/1.1 400"))


async def test_no_secret_in_any_log(start: Start, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    server = await start(tokens=[TOKEN])
    client = await connect(server.url, token=TOKEN)
    await client.send(b"private words")
    await client.receive(5)
    await client.close()
    with pytest.raises(RefusedError):
        await connect(server.url, token="another-token")
    for secret in (TOKEN, "another-token", "private words", "Authorization"):
        assert secret not in caplog.text


async def test_healthz_needs_no_token(start: Start) -> None:
    server = await start(tokens=[TOKEN])
    answer = await http_get(server, "/healthz")
    assert answer.startswith(b"HTTP/1.1 200 OK") and answer.endswith(b"\r\n\r\nok\n")
    assert (await http_get(server, "/elsewhere")).startswith(b"HTTP/1.1 401")
    assert (await http_get(await start(), "/elsewhere")).startswith(b"HTTP/1.1 404")


async def test_web_pages_are_kept_out(start: Start) -> None:
    with pytest.raises(InvalidStatus, match="403"):
        await raw_connect((await start()).url, origin="https://example.com")  # type: ignore[arg-type]


async def test_too_many_connections_are_refused(start: Start) -> None:
    server = await start(max_connections=1)
    first = await connect(server.url)
    await first.send(b"x")
    await first.receive(5)
    with pytest.raises(RefusedError, match="too many connections") as caught:
        await connect(server.url)
    assert caught.value.code == ErrorCode.BUSY
    await first.close()


async def test_connections_that_come_together_count_too(start: Start) -> None:
    server = await start(max_connections=2)
    results = await asyncio.gather(*(connect(server.url) for _ in range(6)), return_exceptions=True)
    admitted = [result for result in results if isinstance(result, WebSocketConnection)]
    assert len(admitted) == 2
    assert sum(isinstance(result, RefusedError) for result in results) == 4
    for client in admitted:
        await client.close()


async def test_oversized_messages_are_refused_on_both_sides(start: Start) -> None:
    seen: asyncio.Queue[Exception | bytes] = asyncio.Queue()

    async def receive_once(connection: Connection) -> None:
        try:
            seen.put_nowait(await connection.receive(5))
        except CotuneError as error:
            seen.put_nowait(error)

    server = await start(receive_once)
    client = await connect(server.url)
    with pytest.raises(FrameError, match="expected at most"):
        await client.send(bytes(MAX_FRAME_BYTES + 1))
    await client.close()
    assert isinstance(await asyncio.wait_for(seen.get(), 5), ConnectionLostError)
    async with raw_connect(server.url, compression=None) as careless:
        await careless.send(bytes(MAX_FRAME_BYTES + 1))
        assert isinstance(await asyncio.wait_for(seen.get(), 5), ConnectionLostError)
        await asyncio.wait_for(careless.wait_closed(), 5)
        assert careless.close_code == 1009


@pytest.mark.parametrize(
    ("said", "message"), [("hello", "expected binary"), (bytes(MAX_FRAME_BYTES + 1), "larger than 2097152 bytes")]
)
async def test_what_no_cloud_says_ends_the_connection(said: str | bytes, message: str) -> None:
    async def say(websocket: ServerConnection) -> None:
        await websocket.send(said)
        await websocket.wait_closed()

    async with raw_serve(say, "127.0.0.1", 0, compression=None) as server:
        client = await connect(f"ws://127.0.0.1:{next(iter(server.sockets)).getsockname()[1]}")
        with pytest.raises(FrameError, match=message):
            await client.receive(5)
        assert client.closed


async def test_a_cloud_that_dies_in_the_middle_of_its_greeting() -> None:
    async def die(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 101 Switching Prot")
        writer.close()

    server = await asyncio.start_server(die, "127.0.0.1", 0)
    with pytest.raises(ConnectionLostError, match="hangs up at once"):
        await connect(f"ws://127.0.0.1:{server.sockets[0].getsockname()[1]}", timeout_s=5)
    server.close()
    await server.wait_closed()


async def test_closing_the_server_ends_connections_and_stuck_handlers(start: Start) -> None:
    cancelled = asyncio.Event()

    async def stuck(connection: Connection) -> None:
        try:
            await asyncio.sleep(60)
        finally:
            cancelled.set()

    server = await start(stuck)
    client = await connect(server.url)
    receiver = asyncio.create_task(client.receive(30))
    await asyncio.sleep(0)
    await server.running.aclose()
    await asyncio.wait_for(cancelled.wait(), 5)
    with pytest.raises(ConnectionLostError, match="closed with code 1012"):
        await receiver
    with pytest.raises(ConnectionLostError, match="connection refused"):
        await connect(server.url)


async def test_a_bug_in_a_handler_ends_one_connection_only(start: Start, caplog: pytest.LogCaptureFixture) -> None:
    async def buggy(connection: Connection) -> None:
        if await connection.receive(5) == b"bug":
            raise ZeroDivisionError
        await connection.send(b"fine")

    server = await start(buggy)
    first, second = await connect(server.url), await connect(server.url)
    await first.send(b"bug")
    with pytest.raises(ConnectionLostError):
        await first.receive(5)
    await second.send(b"x")
    assert await second.receive(5) == b"fine"
    assert "a request failed by a bug" in caplog.text
    await second.close()


async def test_nobody_there(start: Start) -> None:
    server = await start()
    await server.running.aclose()
    for host in ("127.0.0.1", "localhost"):
        with pytest.raises(ConnectionLostError) as caught:
            await connect(f"ws://{host}:{server.port}")
        assert str(caught.value) == (
            f"no cloud answers at ws://{host}:{server.port}: connection refused; start one with `cotune cloud MODEL`"
        )


async def test_a_name_that_does_not_exist() -> None:
    with pytest.raises((ConnectionLostError, WireTimeoutError), match=r"no cloud answers at ws://cotune\.invalid:1"):
        await connect("ws://cotune.invalid:1", timeout_s=5)


async def test_somebody_else_there() -> None:
    async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()
        writer.close()

    async def other(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readline()
        writer.write(b"220 mail.example.com ESMTP\r\n")
        writer.close()

    async def moved(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 302 Found\r\nLocation: ws://127.0.0.1:9/\r\nContent-Length: 0\r\n\r\n")
        writer.close()

    for answer, error, message in [
        (silent, WireTimeoutError, r"within 0\.1 s"),
        (other, WireError, "no cotune cloud"),
        (moved, RefusedError, "HTTP status 302"),  # never followed: the token was not meant for there
    ]:
        server = await asyncio.start_server(answer, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        with pytest.raises(error, match=message):
            await connect(f"ws://127.0.0.1:{port}", token=TOKEN, timeout_s=0.1 if answer is silent else 5)
        server.close()
        await server.wait_closed()


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("http://localhost:1", "expected ws://host:port"),
        ("localhost:1", "expected ws://host:port"),
        ("ws://", "expected ws://host:port"),
        ("ws://localhost:99999", "no valid URL"),
        ("ws://[::1", "no valid URL"),
        ("ws://localhost:1/#x", "expected ws://host:port"),
    ],
)
async def test_bad_urls(url: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        await connect(url)


async def test_secrets_stay_out_of_messages() -> None:
    with pytest.raises(InputError, match="user name or password") as caught:
        await connect("ws://me:hunter2@localhost:1")
    assert "hunter2" not in str(caught.value)
    for token in ("hunter2\r\nX: y", "hunter 2", "hünter2", ""):
        with pytest.raises(InputError, match="a token is empty or holds") as caught:
            await connect("ws://localhost:1", token=token)
        assert "nter" not in str(caught.value)


async def test_tokens_never_travel_in_the_clear() -> None:
    with pytest.raises(InputError, match=r"use wss://example\.com:1"):
        await connect("ws://example.com:1", token=TOKEN)
    with pytest.raises(InputError, match="has no TLS"):
        await connect("ws://localhost:1", tls_ca="ca.pem")


async def test_a_file_of_certificates_that_holds_none(tmp_path: Path) -> None:
    text = tmp_path / "text.pem"
    text.write_text("no certificate")
    for path, message in ((text, "expected certificates in PEM"), (tmp_path / "none.pem", "no such file")):
        with pytest.raises(InputError, match=message):
            await connect("wss://localhost:1", tls_ca=path)


def test_loopback() -> None:
    assert all(map(is_loopback, ["localhost", "127.0.0.1", "127.8.8.8", "::1"]))
    assert not any(map(is_loopback, ["0.0.0.0", "::", "", "localhost.example.com", "10.0.0.1", "example.com"]))


async def test_ipv6(start: Start) -> None:
    if not socket.has_ipv6:
        pytest.skip("no IPv6 here")
    try:
        server = await start(host="::1")
    except InputError:
        pytest.skip("no IPv6 loopback here")
    assert server.url == f"ws://[::1]:{server.port}"
    client = await connect(server.url)
    await client.close()

"""Runs an ASGI application behind uvicorn on one address, until it is told to stop."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import socket
import ssl
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import uvicorn

from cotune.errors import InputError
from cotune.wire.event_loop import asked_to_end
from cotune.wire.frame import MAX_FRAME_BYTES
from cotune.wire.impatient_protocols import Patience, impatient_http, impatient_websocket

PING_INTERVAL_S = 15.0
PING_TIMEOUT_S = 20.0


@dataclass(frozen=True, kw_only=True)
class ServerConfig:
    """Where a server listens, and how patient it is.

    Attributes:
        host: address.
        port: 0 takes any free one.
        tls_cert, tls_key: PEM files; both or none.
        max_connections: one more is answered with 503.
        with_websockets: whether it takes WebSockets.
        grace_s: for how long running requests may go on after the end was asked for, seconds.
        patience: with peers that are slow.
    """

    host: str = "127.0.0.1"
    port: int = 0
    tls_cert: Path | None = None
    tls_key: Path | None = None
    max_connections: int = 256
    with_websockets: bool = False
    grace_s: float = 5.0
    patience: Patience = field(default_factory=Patience)

    def __post_init__(self) -> None:
        # The system's resolver would take 70000 for 4464.
        if not 0 <= self.port <= 65_535:
            raise InputError(f"port is {self.port}, expected 0 to 65535")

    @property
    def is_secure(self) -> bool:
        return self.tls_cert is not None

    def url(self, scheme: str, port: int) -> str:
        """The address with this scheme, `ws` or `http`, which gets an s where there is TLS."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{scheme}{'s' if self.is_secure else ''}://{host}:{port}"


async def run_server(
    application: Any,
    config: ServerConfig,
    *,
    on_ready: Callable[[int], None],
    stop: asyncio.Event | None = None,
    before_ready: Callable[[], Awaitable[object]] | None = None,
    before_end: Callable[[], Awaitable[None]] | None = None,
) -> None:
    """Serve until SIGINT, SIGTERM or `stop`; a second signal ends it without grace.

    Args:
        application: an ASGI application.
        config: where, and how patient.
        on_ready: called once with the port.
        stop: ends the server when set; by default only signals do.
        before_ready: awaited once the address is ours; nothing is served where it fails.
        before_end: awaited when the end is asked for, while everything still runs; a second signal cuts it short.

    Raises:
        InputError: the address or the files cannot be used.
    """
    check_certificate(config)
    with _listening_socket(config) as listener:
        port = int(listener.getsockname()[1])
        if before_ready is not None:
            await before_ready()
        server = _Server(
            uvicorn.Config(
                application,
                http=impatient_http(config.patience),
                # Faster than the others: 48 us for a round trip over uvloop, both ends together; "websockets" takes 72.
                ws=impatient_websocket(config.patience) if config.with_websockets else "none",
                ws_max_size=MAX_FRAME_BYTES,
                ws_ping_interval=PING_INTERVAL_S,
                ws_ping_timeout=PING_TIMEOUT_S,
                ws_per_message_deflate=False,
                lifespan="off",
                log_config=None,
                # What fails in a request is logged where it happens; a cancelled one is no news.
                log_level="critical",
                access_log=False,
                proxy_headers=False,
                server_header=False,
                date_header=False,
                ssl_certfile=config.tls_cert,
                ssl_keyfile=config.tls_key,
                limit_concurrency=config.max_connections,
                timeout_keep_alive=15,
                timeout_graceful_shutdown=max(1, round(config.grace_s)),
            ),
            lambda: on_ready(port),
        )
        await _run(server, listener, stop or asyncio.Event(), before_end)


class _Server(uvicorn.Server):
    """uvicorn's, which leaves signals to us: it would raise them again when all is over. It ends when it is told."""

    def __init__(self, config: uvicorn.Config, on_ready: Callable[[], None]) -> None:
        super().__init__(config)
        self._on_ready = on_ready
        self._end = asyncio.Event()

    def end(self) -> None:
        self.should_exit = True
        self._end.set()

    async def main_loop(self) -> None:
        await self._end.wait()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._on_ready()


async def _run(
    server: _Server,
    listener: socket.socket,
    stop: asyncio.Event,
    before_end: Callable[[], Awaitable[None]] | None,
) -> None:
    asked = asyncio.Event()

    def end() -> None:
        if asked.is_set():  # the second time: without grace
            server.force_exit = True
            server.end()
        asked.set()

    async def wait_for_end() -> None:
        waits = {asyncio.ensure_future(event.wait()) for event in (stop, asked)}
        try:
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
            asked.set()
            if before_end is not None:
                await before_end()
        finally:
            for wait in waits:
                wait.cancel()
            server.end()

    with asked_to_end(end):
        waiter = asyncio.create_task(wait_for_end())
        try:
            await server.serve([listener])
        finally:
            waiter.cancel()
            await asyncio.gather(waiter, return_exceptions=True)


def _listening_socket(config: ServerConfig) -> socket.socket:
    host = "127.0.0.1" if config.host == "localhost" else config.host
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, config.port, type=socket.SOCK_STREAM)[0]
        # With its protocol named: asyncio sets TCP_NODELAY on no other sockets, and each small frame would wait 40 ms.
        listener = socket.socket(family, kind, protocol)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
            listener.listen(1024)
        except BaseException:
            listener.close()
            raise
    except OSError as error:
        number = getattr(error, "errno", None)
        reason = "no such address" if isinstance(error, socket.gaierror) else os.strerror(number or 0).lower()
        advice = "choose another --port" if number == errno.EADDRINUSE else "choose another --host or --port"
        raise InputError(f"cannot listen on {config.host}, port {config.port}: {reason}; {advice}") from None
    listener.setblocking(False)
    return listener


def check_certificate(config: ServerConfig) -> None:
    """Refuse files that TLS cannot use, before anything is served.

    Raises:
        InputError: one of the two is missing, or they cannot be read or do not belong together.
    """
    if config.tls_cert is None and config.tls_key is None:
        return
    if config.tls_cert is None or config.tls_key is None:
        raise InputError("only one of --tls-cert and --tls-key is given; TLS needs both")
    try:
        # Never ask on a terminal for a password.
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(config.tls_cert, config.tls_key, password="")
    except OSError as error:  # ssl.SSLError is one
        reason = error.reason if isinstance(error, ssl.SSLError) else os.strerror(error.errno or 0)
        raise InputError(
            f"--tls-cert {config.tls_cert} and --tls-key {config.tls_key} cannot be used: "
            f"{str(reason).lower().replace('_', ' ')}; expected a certificate and its unencrypted key in PEM"
        ) from None

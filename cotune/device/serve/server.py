"""Runs the application behind uvicorn until it is told to stop."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import signal
import socket
import ssl
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import uvicorn

from cotune.device.serve.application import Totals, make_application
from cotune.device.serve.guards import allowed_hosts
from cotune.device.serve.personal_source import PersonalSource
from cotune.errors import InputError
from cotune.openai_api.bearer import BearerTokens
from cotune.openai_api.routes import ApiLimits
from cotune.wire.websocket import is_loopback

_MAX_CONNECTIONS = 256


@dataclass(frozen=True, kw_only=True)
class ServeConfig:
    """Where a device listens and whom it hears.

    Attributes:
        host: address; other than loopback only with TLS and tokens.
        port: 0 takes any free one.
        tls_cert, tls_key: PEM files.
        token_file: one bearer token a line; None lets every local program in.
        allow_hosts: more values of `Host` that mean this service, such as a name in the local network.
        limits: what one client may ask for.
        grace_s: for how long running texts may go on after the end was asked for, seconds.
    """

    host: str = "127.0.0.1"
    port: int = 7071
    tls_cert: Path | None = None
    tls_key: Path | None = None
    token_file: Path | None = None
    allow_hosts: tuple[str, ...] = ()
    limits: ApiLimits = field(default_factory=ApiLimits)
    grace_s: float = 5.0

    def __post_init__(self) -> None:
        if not 0 <= self.port <= 65_535:
            raise InputError(f"port is {self.port}, expected 0 to 65535")
        if (self.tls_cert is None) != (self.tls_key is None):
            raise InputError("only one of --tls-cert and --tls-key is given; TLS needs both")
        if not is_loopback(self.host) and (self.tls_cert is None or self.token_file is None):
            raise InputError(
                f"host is {self.host!r}, which others can reach; give --tls-cert, --tls-key and --token-file, "
                "or listen on 127.0.0.1"
            )
        for name in self.allow_hosts:
            if not name or not name.isascii() or any(letter in name for letter in "/ *@\t"):
                raise InputError(f"--allow-host is {name!r}, expected a name or name:port, such as laptop.local")
        if not self.grace_s > 0:
            raise InputError(f"grace_s is {self.grace_s}, expected a number above 0")

    @property
    def is_secure(self) -> bool:
        return self.tls_cert is not None

    def url(self, port: int) -> str:
        """The address for a browser."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{'https' if self.is_secure else 'http'}://{host}:{port}"


async def serve(
    source: PersonalSource,
    totals: Totals,
    config: ServeConfig,
    *,
    on_ready: Callable[[str], None],
    stop: asyncio.Event | None = None,
) -> None:
    """Serve until SIGINT, SIGTERM or `stop`; a second signal ends it without grace.

    Args:
        source: makes the texts; its cloud is checked first.
        totals: what has left the device so far, by kind.
        config: where and for whom.
        on_ready: called once with the URL of the page.
        stop: ends the service when set; by default only signals do.

    Raises:
        InputError: the address or the files cannot be used.
        MismatchError: the cloud hosts another model than the plugin's.
        WireError: the cloud is not there.
    """
    tokens = None if config.token_file is None else BearerTokens.read(config.token_file)
    _check_certificate(config)
    with _listening_socket(config) as listener:
        await source.check_cloud()
        port = int(listener.getsockname()[1])
        # A wildcard address is no name; the names of such a service come with --allow-host.
        own_name = () if config.host in ("0.0.0.0", "::") else (config.host,)
        hosts = allowed_hosts(port, secure=config.is_secure, extra=(*own_name, *config.allow_hosts))
        application = make_application(source, totals, hosts=hosts, tokens=tokens, limits=config.limits)
        server = _Server(
            uvicorn.Config(
                application,
                http="h11",
                ws="none",
                lifespan="off",
                log_config=None,
                access_log=False,
                proxy_headers=False,
                server_header=False,
                ssl_certfile=config.tls_cert,
                ssl_keyfile=config.tls_key,
                limit_concurrency=_MAX_CONNECTIONS,
                timeout_keep_alive=15,
                timeout_graceful_shutdown=max(1, round(config.grace_s)),
            ),
            lambda: on_ready(config.url(port)),
        )
        await _run(server, listener, stop or asyncio.Event())


class _Server(uvicorn.Server):
    """uvicorn's, which leaves signals to us: it would raise them again when all is over."""

    def __init__(self, config: uvicorn.Config, on_ready: Callable[[], None]) -> None:
        super().__init__(config)
        self._on_ready = on_ready

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._on_ready()


async def _run(server: _Server, listener: socket.socket, stop: asyncio.Event) -> None:
    def end() -> None:
        # The second time: without grace.
        server.force_exit = server.should_exit
        server.should_exit = True

    async def wait_for_stop() -> None:
        await stop.wait()
        server.should_exit = True

    loop = asyncio.get_running_loop()
    numbers = (signal.SIGINT, signal.SIGTERM)
    for number in numbers:
        # Only the main thread of a process may handle signals; elsewhere `stop` is the way.
        with contextlib.suppress(NotImplementedError, RuntimeError, ValueError):
            loop.add_signal_handler(number, end)
    waiter = asyncio.create_task(wait_for_stop())
    try:
        await server.serve([listener])
    finally:
        waiter.cancel()
        for number in numbers:
            with contextlib.suppress(NotImplementedError, RuntimeError, ValueError):
                loop.remove_signal_handler(number)


def _listening_socket(config: ServeConfig) -> socket.socket:
    host = "127.0.0.1" if config.host == "localhost" else config.host
    try:
        family = socket.getaddrinfo(host, config.port, type=socket.SOCK_STREAM)[0][0]
        listener = socket.create_server((host, config.port), family=family, backlog=128)
    except OSError as error:
        reason = "no such address" if isinstance(error, socket.gaierror) else os.strerror(error.errno or 0).lower()
        advice = "choose another --port" if error.errno == errno.EADDRINUSE else "choose another --host or --port"
        raise InputError(f"cannot listen on {config.host}, port {config.port}: {reason}; {advice}") from None
    listener.setblocking(False)
    return listener


def _check_certificate(config: ServeConfig) -> None:
    if config.tls_cert is None or config.tls_key is None:
        return
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(config.tls_cert, config.tls_key, password="")
    except OSError as error:  # ssl.SSLError is one
        raise InputError(
            f"--tls-cert {config.tls_cert} and --tls-key {config.tls_key} cannot be used ({error.strerror}); "
            "expected a certificate and its unencrypted key in PEM"
        ) from None

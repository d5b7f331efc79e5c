"""Runs the application behind uvicorn until it is told to stop."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from starlette.types import ASGIApp, Receive, Scope, Send

from cotune.device.serve.application import Totals, make_application
from cotune.device.serve.guards import allowed_hosts
from cotune.device.serve.source import DeviceSource
from cotune.errors import InputError
from cotune.openai_api.bearer import BearerTokens
from cotune.openai_api.routes import ApiLimits
from cotune.wire.asgi_server import ServerConfig, run_server
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


async def serve(
    source: DeviceSource,
    totals: Totals,
    config: ServeConfig,
    *,
    on_ready: Callable[[str], None],
    stop: asyncio.Event | None = None,
) -> None:
    """Serve until SIGINT, SIGTERM or `stop`; a second signal ends it without grace.

    Args:
        source: makes the texts; it is started first, which checks its cloud.
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
    server = ServerConfig(
        host=config.host,
        port=config.port,
        tls_cert=config.tls_cert,
        tls_key=config.tls_key,
        max_connections=_MAX_CONNECTIONS,
        grace_s=config.grace_s,
    )
    # The names that mean us hold the port, which is known when we listen.
    doors: list[ASGIApp] = []

    async def application(scope: Scope, receive: Receive, send: Send) -> None:
        await doors[0](scope, receive, send)

    def ready(port: int) -> None:
        # A wildcard address is no name; the names of such a service come with --allow-host.
        own_name = () if config.host in ("0.0.0.0", "::") else (config.host,)
        hosts = allowed_hosts(port, secure=server.is_secure, extra=(*own_name, *config.allow_hosts))
        doors.append(make_application(source, totals, hosts=hosts, tokens=tokens, limits=config.limits))
        on_ready(server.url("http", port))

    try:
        await run_server(application, server, on_ready=ready, stop=stop, before_ready=source.start)
    finally:
        # Before the loop ends, which would take the network away from under the farewells.
        await source.close()

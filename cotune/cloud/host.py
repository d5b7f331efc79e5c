"""Puts a cloud service behind a WebSocket and runs it until it is told to stop."""

from __future__ import annotations

import asyncio
import contextlib
import signal
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from cotune.cloud.hosted import HostedModel
from cotune.cloud.service import CloudService, ServiceConfig
from cotune.errors import InputError
from cotune.wire.websocket import is_loopback, serve


@dataclass(frozen=True, kw_only=True)
class HostConfig:
    """Where a cloud listens and whom it lets in.

    Attributes:
        host: address; other than loopback only with TLS and tokens.
        port: 0 takes any free one.
        tls_cert, tls_key: PEM files.
        token_file: one bearer token a line; empty lines and lines that start with # are skipped.
        service: limits of the service.
    """

    host: str = "127.0.0.1"
    port: int = 7070
    tls_cert: Path | None = None
    tls_key: Path | None = None
    token_file: Path | None = None
    service: ServiceConfig = field(default_factory=ServiceConfig)

    def __post_init__(self) -> None:
        if not 0 <= self.port <= 65_535:
            raise InputError(f"port is {self.port}, expected 0 to 65535")
        if not is_loopback(self.host) and (self.tls_cert is None or self.tls_key is None or self.token_file is None):
            raise InputError(
                f"host is {self.host!r}, which others can reach; give --tls-cert, --tls-key and --token-file, "
                "or listen on 127.0.0.1"
            )


def read_tokens(path: Path) -> list[str]:
    """The bearer tokens in a file.

    Raises:
        InputError: the file cannot be read, or holds none.
    """
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"token file {path} cannot be read ({error}); expected one token a line") from error
    tokens = [line for line in lines if line and not line.startswith("#")]
    if not tokens:
        raise InputError(f"token file {path} holds no token, expected one a line")
    return tokens


async def host(
    model: HostedModel,
    config: HostConfig,
    *,
    on_ready: Callable[[str], None],
    stop: asyncio.Event | None = None,
) -> None:
    """Serve `model` until SIGINT, SIGTERM or `stop`.

    Args:
        model: what to serve.
        config: where and for whom.
        on_ready: called once with the URL that devices connect to.
        stop: ends the service when set; by default only signals do.
    """
    stop = stop or asyncio.Event()
    tokens = None if config.token_file is None else read_tokens(config.token_file)
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        # Only the main thread of a process may handle signals; elsewhere `stop` is the way.
        with contextlib.suppress(NotImplementedError, RuntimeError, ValueError):
            loop.add_signal_handler(number, stop.set)
    service = CloudService(model, config.service)
    try:
        server = await serve(
            service.handle,
            config.host,
            config.port,
            tls_cert=config.tls_cert,
            tls_key=config.tls_key,
            tokens=tokens,
            max_connections=2 * config.service.max_sessions,
        )
        try:
            on_ready(server.url)
            await stop.wait()
        finally:
            await server.close()
    finally:
        service.close()

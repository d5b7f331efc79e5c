"""Puts a cloud service behind its front and runs it until it is told to stop."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from cotune.cloud.front import FrontConfig, front
from cotune.cloud.hosted import HostedModel
from cotune.cloud.service import CloudService, ServiceConfig
from cotune.errors import InputError
from cotune.openai_api.bearer import BearerTokens
from cotune.openai_api.plain_chat import plain_chat_format
from cotune.openai_api.source import ChatFormat
from cotune.wire.asgi_server import ServerConfig, run_server
from cotune.wire.impatient_protocols import Patience
from cotune.wire.websocket import is_loopback


@dataclass(frozen=True, kw_only=True)
class HostConfig:
    """Where a cloud listens and whom it lets in.

    Attributes:
        host: address; other than loopback only with TLS and tokens.
        port: 0 takes any free one.
        tls_cert, tls_key: PEM files.
        token_file: one bearer token a line; empty lines and lines that start with # are skipped.
        drain_s: for how long running texts may go on after the end was asked for, seconds; the rest go back to their
            devices, which go on elsewhere.
        chat_format: makes a prompt of a conversation for the OpenAI interface; None is a plain form.
        service: limits of the service.
    """

    host: str = "127.0.0.1"
    port: int = 7070
    tls_cert: Path | None = None
    tls_key: Path | None = None
    token_file: Path | None = None
    drain_s: float = 30.0
    chat_format: ChatFormat | None = None
    service: ServiceConfig = field(default_factory=ServiceConfig)

    def __post_init__(self) -> None:
        if not 0 <= self.port <= 65_535:
            raise InputError(f"port is {self.port}, expected 0 to 65535")
        if self.drain_s < 0:
            raise InputError(f"drain_s is {self.drain_s}, expected 0 or more")
        if not is_loopback(self.host) and (self.tls_cert is None or self.tls_key is None or self.token_file is None):
            raise InputError(
                f"host is {self.host!r}, which others can reach; give --tls-cert, --tls-key and --token-file, "
                "or listen on 127.0.0.1"
            )


async def host(
    model: HostedModel,
    config: HostConfig,
    *,
    on_ready: Callable[[str], None],
    stop: asyncio.Event | None = None,
) -> None:
    """Serve `model` until SIGINT, SIGTERM or `stop`; a second signal ends it without waiting for anybody.

    Args:
        model: what to serve.
        config: where and for whom.
        on_ready: called once with the URL that devices connect to.
        stop: ends the service when set; by default only signals do.
    """
    tokens = None if config.token_file is None else BearerTokens.read(config.token_file)
    server = ServerConfig(
        host=config.host,
        port=config.port,
        tls_cert=config.tls_cert,
        tls_key=config.tls_key,
        # Also those of the OpenAI interface, and of whoever asks for metrics.
        max_connections=4 * config.service.max_sessions + 64,
        with_websockets=True,
        grace_s=1.0,
        patience=Patience(stalled_s=config.service.slow_reader_timeout_s),
    )
    service = CloudService(model, config.service)
    application = front(
        service,
        FrontConfig(
            tokens=tokens,
            max_connections=2 * config.service.max_sessions,
            chat_format=config.chat_format or plain_chat_format,
        ),
    )
    try:
        await run_server(
            application,
            server,
            on_ready=lambda port: on_ready(server.url("ws", port)),
            stop=stop,
            before_end=lambda: service.drain(config.drain_s),
        )
    finally:
        service.close()

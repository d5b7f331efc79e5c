"""The options with which a device reaches its cloud, and what they come to."""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Annotated

import typer

from cotune.errors import InputError
from cotune.ledger import EgressLedger
from cotune.wire.emulator import EmulatedConnection, NetworkProfile
from cotune.wire.ledgered import LedgeredConnection
from cotune.wire.transport import Connection
from cotune.wire.websocket import connect

TOKEN_VARIABLE = "COTUNE_TOKEN"

CloudOption = Annotated[str, typer.Option("--cloud", help="URL of the cloud: ws://host:port, or wss:// for TLS.")]
OptionalCloudOption = Annotated[
    str | None,
    typer.Option("--cloud", help="URL of the cloud: ws://host:port, or wss:// for TLS. Left out with --offline alone."),
]
TokenFileOption = Annotated[
    Path | None,
    typer.Option(help=f"File with the bearer token; without it the variable {TOKEN_VARIABLE} is used, if set."),
]
TlsCaOption = Annotated[Path | None, typer.Option(help="Certificates to trust, PEM; the system's own if left out.")]
RttOption = Annotated[float, typer.Option(help="Emulate a network with this round-trip time, ms.")]


def connector(
    url: str,
    *,
    token_file: Path | None = None,
    tls_ca: Path | None = None,
    ledger: EgressLedger | None = None,
    way: str = "spa",
    profile: NetworkProfile | None = None,
    seed: int = 0,
) -> Callable[[], Awaitable[Connection]]:
    """A function that connects to `url`, through the ledger and an emulated network where they are given."""
    token = _token(token_file)

    async def make() -> Connection:
        connection = await connect(url, token=token, tls_ca=tls_ca)
        if profile is not None:
            connection = EmulatedConnection(connection, profile, seed)
        return connection if ledger is None else LedgeredConnection(connection, ledger, way)

    return make


def emulated(rtt_ms: float) -> NetworkProfile | None:
    """The profile of a round-trip time; None for the network as it is."""
    if rtt_ms < 0:
        raise InputError(f"--rtt-ms is {rtt_ms}, expected 0 or more")
    return NetworkProfile(delay_ms=rtt_ms / 2) if rtt_ms else None


def _token(path: Path | None) -> str | None:
    if path is None:
        return os.environ.get(TOKEN_VARIABLE) or None
    try:
        token = path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"token file {path} cannot be read ({error}); expected one line") from error
    if not token:
        raise InputError(f"token file {path} is empty, expected the bearer token in its first line")
    return token

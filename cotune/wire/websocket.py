"""A device's connections over WebSocket; `cotune.cloud.front` is the other end.

Binary messages only, compression off, TCP_NODELAY (asyncio sets it on every TCP socket), pings every 15 s, messages of
at most `MAX_FRAME_BYTES`. A bearer token in the `Authorization` header admits a device; it is never logged.

The counters of a connection count message bytes. Framing adds, for each message, 2 bytes below 126 bytes of payload,
4 below 65,536, 10 above, and 4 more from client to server (the mask); TLS 1.3 adds 22 for each record of up to 16 KiB,
and TCP and IP 40 (IPv4) or 60 (IPv6) for each packet, 12 more with timestamps.
"""

from __future__ import annotations

import asyncio
import errno
import ipaddress
import logging
import os
import socket
import ssl
from http import HTTPStatus
from pathlib import Path
from urllib.parse import SplitResult, urlsplit

from websockets.asyncio.client import ClientConnection
from websockets.asyncio.client import connect as open_websocket
from websockets.exceptions import ConnectionClosed, InvalidHandshake, InvalidStatus
from websockets.frames import CloseCode
from websockets.protocol import State

from cotune.errors import (
    ConnectionLostError,
    FrameError,
    InputError,
    RefusedError,
    WireError,
    WireTimeoutError,
)
from cotune.wire.codes import ErrorCode
from cotune.wire.frame import MAX_FRAME_BYTES
from cotune.wire.transport import Connection, Traffic, check_size

PING_INTERVAL_S = 15.0
PING_TIMEOUT_S = 20.0
OPEN_TIMEOUT_S = 10.0
CLOSE_TIMEOUT_S = 2.0

# The library's own debug log shows headers, and with them tokens. This logger belongs to nobody and says nothing.
_SILENT = logging.Logger("cotune.wire.websocket.silent", level=logging.CRITICAL + 1)


class WebSocketConnection(Traffic):
    """The device's end of a WebSocket; see `cotune.wire.transport.Connection`."""

    def __init__(self, websocket: ClientConnection, peer: str) -> None:
        super().__init__()
        self._websocket = websocket
        self._peer = peer

    @property
    def closed(self) -> bool:
        return self._websocket.state is not State.OPEN

    async def send(self, data: bytes) -> None:
        check_size(data)
        try:
            await self._websocket.send(bytes(data))
        except ConnectionClosed as error:
            raise self._lost(error) from None
        self.sent(data)

    async def receive(self, timeout_s: float) -> bytes:
        try:
            async with asyncio.timeout(timeout_s):
                data = await self._websocket.recv()
        except TimeoutError:
            raise WireTimeoutError(f"nothing came from {self._peer} within {timeout_s:g} s") from None
        except ConnectionClosed as error:
            if error.sent is not None and error.sent.code == CloseCode.MESSAGE_TOO_BIG:
                raise FrameError(
                    f"a message larger than {MAX_FRAME_BYTES} bytes came from {self._peer}; the connection is closed"
                ) from None
            raise self._lost(error) from None
        if isinstance(data, str):
            await self._websocket.close(CloseCode.UNSUPPORTED_DATA, "binary messages only")
            raise FrameError(f"a text message came from {self._peer}, expected binary; the connection is closed")
        self.received(data)
        return data

    async def close(self) -> None:
        await self._websocket.close()

    def _lost(self, error: ConnectionClosed) -> ConnectionLostError:
        if error.rcvd is not None and error.rcvd.reason:
            why = f"it said {error.rcvd.reason!r}"
        elif error.rcvd is not None:
            why = f"closed with code {int(error.rcvd.code)}"
        elif error.sent is not None and error.sent.code == CloseCode.INTERNAL_ERROR:
            why = "no answer to pings"
        else:
            why = "closed" if error.sent is not None else "broken"
        return ConnectionLostError(f"the connection to {self._peer} is over: {why}; connect again to go on")


class _ConnectOnce(open_websocket):
    """A client that follows no redirects: a token goes to the address it was meant for."""

    def process_redirect(self, exc: Exception) -> Exception | str:
        return exc


async def connect(
    url: str, *, token: str | None = None, tls_ca: Path | str | None = None, timeout_s: float = OPEN_TIMEOUT_S
) -> Connection:
    """Connect to a cloud.

    Args:
        url: ws://host:port, or wss://host:port for TLS.
        token: the bearer token, where the cloud asks for one.
        tls_ca: file with the certificates to trust, in PEM; the system's own if None.
        timeout_s: for everything until the connection stands, seconds.

    Raises:
        InputError: the URL, the token or the certificate file cannot be used.
        ConnectionLostError: nobody answers there; trying again later may help.
        WireTimeoutError: no connection within `timeout_s`.
        RefusedError: the cloud said no: a wrong token, or too many connections.
        WireError: TLS fails, or what answers is no cloud.
    """
    parts = _split(url)
    host, where = str(parts.hostname), f"{parts.scheme}://{parts.netloc}"
    secure = parts.scheme == "wss"
    headers = {} if token is None else {"Authorization": f"Bearer {_checked_token(token)}"}
    if token is not None and not secure and not is_loopback(host):
        raise InputError(f"a token for {where} would travel in the clear; use wss://{parts.netloc}")
    if tls_ca is not None and not secure:
        raise InputError(f"tls_ca is given for {where}, which has no TLS; use wss://{parts.netloc} or drop it")
    try:
        websocket = await _ConnectOnce(
            url,
            additional_headers=headers,
            compression=None,
            proxy=None,
            ssl=_client_context(tls_ca) if secure else None,
            open_timeout=timeout_s,
            ping_interval=PING_INTERVAL_S,
            ping_timeout=PING_TIMEOUT_S,
            close_timeout=CLOSE_TIMEOUT_S,
            max_size=MAX_FRAME_BYTES,
            logger=_SILENT,
        )
    except (OSError, InvalidHandshake, EOFError) as error:
        raise _translate(error, where, timeout_s) from None
    return WebSocketConnection(websocket, where)


def is_loopback(host: str) -> bool:
    """Whether `host` can only mean this machine."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _split(url: str) -> SplitResult:
    try:
        parts = urlsplit(url)
        _ = parts.port
    except ValueError:
        raise InputError(f"{url!r} is no valid URL, expected ws://host:port or wss://host:port") from None
    if parts.username is not None or parts.password is not None:
        raise InputError("the URL of the cloud holds a user name or password; give the token as token instead")
    if parts.scheme not in ("ws", "wss") or not parts.hostname or parts.fragment:
        raise InputError(f"{url!r} is no address of a cloud, expected ws://host:port or wss://host:port")
    return parts


def _checked_token(token: str) -> str:
    if not token or not all("!" <= character <= "~" for character in token):
        raise InputError("a token is empty or holds other than visible ASCII characters; choose another one")
    return token


def _client_context(tls_ca: Path | str | None) -> ssl.SSLContext:
    try:
        return ssl.create_default_context(cafile=tls_ca)
    except OSError as error:  # ssl.SSLError is one
        raise InputError(f"tls_ca {tls_ca} cannot be read: {_reason(error)}; expected certificates in PEM") from None


def _translate(error: Exception, where: str, timeout_s: float) -> WireError:
    if isinstance(error, TimeoutError):
        return WireTimeoutError(f"no cloud answers at {where} within {timeout_s:g} s")
    if isinstance(error, InvalidStatus):
        status = error.response.status_code
        if status == HTTPStatus.UNAUTHORIZED:
            return RefusedError(ErrorCode.UNAUTHORISED, f"the cloud at {where} does not accept the token; ask its host")
        if status == HTTPStatus.SERVICE_UNAVAILABLE:
            return RefusedError(ErrorCode.BUSY, f"the cloud at {where} has too many connections; try again later")
        return RefusedError(ErrorCode.BAD_REQUEST, f"{where} answers with HTTP status {status}; is it a cotune cloud?")
    if isinstance(error, ssl.SSLCertVerificationError):
        return WireError(f"the certificate of {where} is not trusted: {error.verify_message}; give its CA as tls_ca")
    if isinstance(error, ssl.SSLError):
        return WireError(f"no TLS with {where}: {_reason(error)}; is it a ws:// address?")
    # Also a cloud that died in the middle of the greeting: another may stand there in a moment.
    if isinstance(error, ConnectionResetError | EOFError) or isinstance(error.__cause__, EOFError):
        other = "ws" if where.startswith("wss:") else "wss"
        return ConnectionLostError(f"{where} hangs up at once; is it a {other}:// address, or no cotune cloud?")
    if isinstance(error, OSError):
        return ConnectionLostError(
            f"no cloud answers at {where}: {_reason(error)}; start one with `cotune cloud MODEL`"
        )
    return WireError(f"what answers at {where} is no cotune cloud ({type(error).__name__}); is it a wss:// address?")


def _reason(error: Exception) -> str:
    if isinstance(error, socket.gaierror):
        return "the host name is not known"
    if isinstance(error, ConnectionRefusedError) or f"[Errno {errno.ECONNREFUSED}]" in str(error):
        return "connection refused"
    if isinstance(error, ssl.SSLError):
        return str(error.reason or "not in the expected form").lower().replace("_", " ")
    if isinstance(error, OSError) and error.errno is not None:
        return os.strerror(error.errno).lower()
    return str(error)

"""Connections over WebSocket: the client's `connect` and the cloud's `serve`.

Binary messages only, compression off, TCP_NODELAY (asyncio sets it on every TCP socket), pings every 15 s, messages of
at most `MAX_FRAME_BYTES`. A bearer token in the `Authorization` header admits a device; it is compared in constant time
and never logged. `GET /healthz` answers 200.

The counters of a connection count message bytes. Framing adds, for each message, 2 bytes below 126 bytes of payload,
4 below 65,536, 10 above, and 4 more from client to server (the mask); TLS 1.3 adds 22 for each record of up to 16 KiB,
and TCP and IP 40 (IPv4) or 60 (IPv6) for each packet, 12 more with timestamps.
"""

from __future__ import annotations

import asyncio
import errno
import hmac
import ipaddress
import logging
import os
import socket
import ssl
from collections.abc import Awaitable, Callable, Collection
from hashlib import sha256
from http import HTTPStatus
from pathlib import Path
from urllib.parse import SplitResult, urlsplit

from websockets.asyncio.client import ClientConnection
from websockets.asyncio.client import connect as open_websocket
from websockets.asyncio.server import Server, ServerConnection
from websockets.asyncio.server import serve as serve_websocket
from websockets.exceptions import ConnectionClosed, InvalidHandshake, InvalidStatus
from websockets.frames import CloseCode
from websockets.http11 import Request, Response
from websockets.protocol import State

from cotune.errors import (
    ConnectionLostError,
    CotuneError,
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

Handler = Callable[[Connection], Awaitable[None]]

_LOG = logging.getLogger(__name__)
# The library's own debug log shows headers, and with them tokens. This logger belongs to nobody and says nothing.
_SILENT = logging.Logger("cotune.wire.websocket.silent", level=logging.CRITICAL + 1)


class WebSocketConnection(Traffic):
    """One end of a WebSocket; see `cotune.wire.transport.Connection`."""

    def __init__(self, websocket: ClientConnection | ServerConnection, peer: str) -> None:
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


class WebSocketServer:
    """A listening cloud, as `serve` makes it."""

    def __init__(self, server: Server, host: str, scheme: str, tasks: set[asyncio.Task[None]]) -> None:
        self._server = server
        self._tasks = tasks
        self.port = int(next(iter(server.sockets)).getsockname()[1])
        """The port, also where 0 was asked for."""
        self.url = f"{scheme}://{f'[{host}]' if ':' in host else host}:{self.port}"
        """Where devices connect."""

    @property
    def num_connections(self) -> int:
        """How many connections are being served."""
        return len(self._tasks)

    async def close(self, grace_s: float = 5.0) -> None:
        """Stop listening, close all connections, cancel handlers that have not ended after `grace_s` seconds."""
        self._server.close()
        try:
            async with asyncio.timeout(grace_s):
                await self._server.wait_closed()
        except TimeoutError:
            for task in self._tasks:
                task.cancel()
            await self._server.wait_closed()


async def serve(
    handler: Handler,
    host: str = "127.0.0.1",
    port: int = 0,
    *,
    tls_cert: Path | str | None = None,
    tls_key: Path | str | None = None,
    tokens: Collection[str] | None = None,
    max_connections: int = 64,
) -> WebSocketServer:
    """Listen, and run `handler` for each connection; the connection closes when the handler ends.

    Args:
        handler: serves one connection; its CotuneErrors end that connection only.
        host: address to listen on; other than loopback only with TLS and tokens.
        port: 0 for any free one.
        tls_cert: certificate chain in PEM.
        tls_key: its private key in PEM.
        tokens: the bearer tokens that are let in; None lets everybody in.
        max_connections: more than these are refused with 503.

    Raises:
        InputError: an argument cannot be used, or the address cannot be listened on.
    """
    digests = _token_digests(tokens)
    context = _server_context(tls_cert, tls_key)
    if not is_loopback(host) and (context is None or digests is None):
        raise InputError(
            f"listening on {host or 'all addresses'} lets others in; give tls_cert, tls_key and tokens, "
            "or listen on 127.0.0.1"
        )
    if max_connections < 1:
        raise InputError(f"max_connections is {max_connections}, expected at least 1")
    tasks: set[asyncio.Task[None]] = set()

    def admit(websocket: ServerConnection, request: Request) -> Response | None:
        path = request.path.split("?")[0]
        if path == "/healthz":
            return websocket.respond(HTTPStatus.OK, "ok\n")
        if path != "/":
            return websocket.respond(HTTPStatus.NOT_FOUND, "sessions are at /\n")
        if digests is not None and not _is_authorised(request.headers.get_all("Authorization"), digests):
            response = websocket.respond(HTTPStatus.UNAUTHORIZED, "a valid bearer token is needed\n")
            response.headers["WWW-Authenticate"] = "Bearer"
            return response
        if len(tasks) >= max_connections:
            return websocket.respond(HTTPStatus.SERVICE_UNAVAILABLE, "too many connections\n")
        return None

    async def handle(websocket: ServerConnection) -> None:
        task = asyncio.current_task()
        assert task is not None
        tasks.add(task)
        try:
            await handler(WebSocketConnection(websocket, "the device"))
        except CotuneError as error:
            _LOG.info("a connection ended: %s", error)
        except Exception:
            _LOG.exception("a connection ended by a bug in its handler")
        finally:
            tasks.discard(task)

    try:
        server = await serve_websocket(
            handle,
            host,
            port,
            ssl=context,
            process_request=admit,
            origins=[None],  # browsers send an origin: no web page may reach a cloud on this machine
            compression=None,
            server_header=None,
            open_timeout=OPEN_TIMEOUT_S,
            ping_interval=PING_INTERVAL_S,
            ping_timeout=PING_TIMEOUT_S,
            close_timeout=CLOSE_TIMEOUT_S,
            max_size=MAX_FRAME_BYTES,
            logger=_SILENT,
        )
    except (OSError, OverflowError) as error:
        raise InputError(f"cannot listen on {host}, port {port}: {_reason(error)}; choose another") from None
    return WebSocketServer(server, host, "ws" if context is None else "wss", tasks)


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


def _token_digests(tokens: Collection[str] | None) -> list[bytes] | None:
    if tokens is None:
        return None
    if isinstance(tokens, str) or not tokens:
        raise InputError("tokens must be a collection with at least one token; None lets everybody in")
    return [sha256(_checked_token(token).encode()).digest() for token in tokens]


def _is_authorised(headers: list[str], digests: list[bytes]) -> bool:
    scheme, _, token = headers[0].partition(" ") if len(headers) == 1 else ("", "", "")
    digest = sha256(token.strip().encode(errors="surrogateescape")).digest()
    matches = [hmac.compare_digest(digest, known) for known in digests]
    return scheme.lower() == "bearer" and any(matches)


def _client_context(tls_ca: Path | str | None) -> ssl.SSLContext:
    try:
        return ssl.create_default_context(cafile=tls_ca)
    except OSError as error:  # ssl.SSLError is one
        raise InputError(f"tls_ca {tls_ca} cannot be read: {_reason(error)}; expected certificates in PEM") from None


def _server_context(tls_cert: Path | str | None, tls_key: Path | str | None) -> ssl.SSLContext | None:
    if tls_cert is None and tls_key is None:
        return None
    if tls_cert is None or tls_key is None:
        raise InputError("only one of tls_cert and tls_key is given; TLS needs both")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        context.load_cert_chain(tls_cert, tls_key, password="")  # never ask on a terminal
    except OSError as error:
        raise InputError(
            f"tls_cert {tls_cert} and tls_key {tls_key} cannot be used: {_reason(error)}; "
            "expected a certificate and its unencrypted key in PEM"
        ) from None
    return context


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

"""The WebSocket session as an ASGI application, for servers that bring their own sockets, such as Ray Serve."""

from __future__ import annotations

import asyncio

from starlette.applications import Starlette
from starlette.requests import HTTPConnection
from starlette.responses import PlainTextResponse
from starlette.routing import Route, WebSocketRoute
from starlette.websockets import WebSocket, WebSocketDisconnect

from cotune.cloud.service import CloudService
from cotune.errors import ConnectionLostError, FrameError, WireTimeoutError
from cotune.openai_api.bearer import BearerTokens
from cotune.wire.frame import MAX_FRAME_BYTES
from cotune.wire.transport import Traffic, check_size

_UNSUPPORTED_DATA, _POLICY_VIOLATION, _TOO_BIG = 1003, 1008, 1009


def session_app(service: CloudService, tokens: BearerTokens | None = None) -> Starlette:
    """Sessions at `/` over WebSocket, and `/healthz`.

    Args:
        service: answers the devices.
        tokens: who is let in; None lets everybody in.
    """

    async def session(websocket: WebSocket) -> None:
        # Browsers send an origin: no web page may reach a cloud on this machine.
        if "origin" in websocket.headers:
            await _deny(websocket, 403)
            return
        if tokens is not None and not tokens.admits(websocket.headers.getlist("authorization")):
            await _deny(websocket, 401)
            return
        await websocket.accept()
        await service.handle(AsgiConnection(websocket))

    async def health(connection: HTTPConnection) -> PlainTextResponse:
        return PlainTextResponse("ok\n", 503 if service.is_draining else 200)

    return Starlette(routes=[WebSocketRoute("/", session), Route("/healthz", health)])


async def _deny(websocket: WebSocket, status: int) -> None:
    if "websocket.http.response" in websocket.scope.get("extensions", {}):
        headers = {"WWW-Authenticate": "Bearer"} if status == 401 else None
        await websocket.send_denial_response(PlainTextResponse("not let in\n", status, headers))
    else:
        await websocket.close(_POLICY_VIOLATION)


class AsgiConnection(Traffic):
    """One device's WebSocket as an ASGI server hands it over; see `cotune.wire.transport.Connection`."""

    def __init__(self, websocket: WebSocket) -> None:
        super().__init__()
        self._websocket = websocket
        self._is_closed = False

    @property
    def closed(self) -> bool:
        return self._is_closed

    async def send(self, data: bytes) -> None:
        check_size(data)
        try:
            await self._websocket.send_bytes(bytes(data))
        except (WebSocketDisconnect, RuntimeError, OSError):
            raise self._lost() from None
        self.sent(data)

    async def receive(self, timeout_s: float) -> bytes:
        try:
            async with asyncio.timeout(timeout_s):
                message = await self._websocket.receive()
        except TimeoutError:
            raise WireTimeoutError(f"nothing came from the device within {timeout_s:g} s") from None
        except (WebSocketDisconnect, RuntimeError, OSError):
            raise self._lost() from None
        if message["type"] == "websocket.disconnect":
            raise self._lost()
        data: bytes | None = message.get("bytes")
        if data is None:
            await self._hang_up(_UNSUPPORTED_DATA)
            raise FrameError("a text message came from the device, expected binary; the connection is closed")
        if len(data) > MAX_FRAME_BYTES:
            await self._hang_up(_TOO_BIG)
            raise FrameError(
                f"a message of {len(data)} bytes came from the device, expected at most {MAX_FRAME_BYTES}; "
                "the connection is closed"
            )
        self.received(data)
        return data

    async def close(self) -> None:
        await self._hang_up(1000)

    async def _hang_up(self, code: int) -> None:
        if self._is_closed:
            return
        self._is_closed = True
        try:
            async with asyncio.timeout(2.0):
                await self._websocket.close(code)
        except (TimeoutError, WebSocketDisconnect, RuntimeError, OSError):
            return

    def _lost(self) -> ConnectionLostError:
        self._is_closed = True
        return ConnectionLostError("the connection to the device is over; it may connect again to go on")

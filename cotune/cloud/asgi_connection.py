"""A device's WebSocket as an ASGI server hands it over: uvicorn here, or Ray Serve."""

from __future__ import annotations

import asyncio

from starlette.websockets import WebSocket, WebSocketDisconnect

from cotune.errors import ConnectionLostError, FrameError, WireTimeoutError
from cotune.wire.frame import MAX_FRAME_BYTES
from cotune.wire.transport import Traffic, check_size

_NORMAL, _UNSUPPORTED_DATA, _TOO_BIG = 1000, 1003, 1009
_CLOSE_TIMEOUT_S = 2.0
# After so many messages without a pause the others get a turn: messages that are there already come without one.
_TURN = 32


class AsgiConnection(Traffic):
    """One device's WebSocket; see `cotune.wire.transport.Connection`.

    Args:
        websocket: accepted already.
    """

    def __init__(self, websocket: WebSocket) -> None:
        super().__init__()
        self._websocket = websocket
        self._is_closed = self._is_hung_up = False
        self._patience: asyncio.Timeout | None = None

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
        if self._is_hung_up:
            raise self._lost()
        if self.frames_received % _TURN == 0:
            await asyncio.sleep(0)
        try:
            async with asyncio.timeout(timeout_s) as self._patience:
                message = await self._websocket.receive()
        except TimeoutError:
            if self._is_hung_up:
                raise self._lost() from None
            raise WireTimeoutError(f"nothing came from the device within {timeout_s:g} s") from None
        except (WebSocketDisconnect, RuntimeError, OSError):
            raise self._lost() from None
        finally:
            self._patience = None
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
        await self._hang_up(_NORMAL)

    async def _hang_up(self, code: int) -> None:
        if self._is_hung_up:
            return
        self._is_closed = self._is_hung_up = True
        if self._patience is not None:
            # Whoever receives learns of it now, whether or not the device takes the farewell.
            self._patience.reschedule(asyncio.get_running_loop().time())
        try:
            async with asyncio.timeout(_CLOSE_TIMEOUT_S):
                await self._websocket.close(code)
        except (TimeoutError, WebSocketDisconnect, RuntimeError, OSError):
            return

    def _lost(self) -> ConnectionLostError:
        self._is_closed = True
        return ConnectionLostError("the connection to the device is over; it may connect again to go on")

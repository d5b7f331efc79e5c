"""uvicorn's two protocols, which hang up on peers that take too long and hold no memory for those that take too much.

What uvicorn leaves open, and what is done here about it:

    a head of a request that comes byte by byte           cut after `head_s`
    a WebSocket whose handshake never ends                 cut after `head_s`
    a peer that reads (nearly) nothing of what it asked    cut when its buffer stays full for `stalled_s`
    a closed connection with bytes that nobody reads       cut after `LINGER_S`
    pings whose pongs nobody reads                         cut when the buffer holds `MAX_BUFFER_BYTES`
    a message in endlessly many pieces                     cut after `MAX_FRAGMENTS`
    the end of a server while a peer hangs up              goes on with the others
"""

from __future__ import annotations

import asyncio
from asyncio import BaseTransport, TimerHandle, Transport
from dataclasses import dataclass
from typing import Any, cast

from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol
from websockets.frames import CloseCode, Frame
from websockets.protocol import State

from cotune.wire.frame import MAX_FRAME_BYTES

LINGER_S = 5.0
"""How long a closed connection may take to carry its last bytes, seconds."""

MAX_BUFFER_BYTES = 2 * MAX_FRAME_BYTES + 256 * 1024
"""Two messages that just went out, and then some."""

MAX_FRAGMENTS = 4096


@dataclass(frozen=True, kw_only=True)
class Patience:
    """How long a peer may take.

    Attributes:
        head_s: for the head of a request, and between two requests on one connection, seconds.
        stalled_s: to read what fills its buffer, seconds.
    """

    head_s: float = 10.0
    stalled_s: float = 60.0


class _Deadline:
    """Hangs up when it comes."""

    def __init__(self, transport: BaseTransport) -> None:
        self._transport = cast(Transport, transport)
        self._timer: TimerHandle | None = None
        self._is_over = False

    def set(self, seconds: float) -> None:
        self.cancel()
        if not self._is_over:
            self._timer = asyncio.get_running_loop().call_later(seconds, self._transport.abort)

    def cancel(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def end(self) -> None:
        """The connection is over: from now on setting it does nothing."""
        self.cancel()
        self._is_over = True


def impatient_http(patience: Patience) -> type[H11Protocol]:
    """uvicorn's HTTP protocol with deadlines."""

    class ImpatientHttp(H11Protocol):
        def connection_made(self, transport: Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            self._head, self._stalled = _Deadline(transport), _Deadline(transport)
            self._head.set(patience.head_s)

        def handle_events(self) -> None:
            super().handle_events()
            # `cycle` is the request at hand; there is one from the end of its head on.
            if self.cycle is not None and not self.cycle.response_complete:
                self._head.cancel()

        def on_response_complete(self) -> None:
            super().on_response_complete()
            self._head.set(patience.head_s)

        def pause_writing(self) -> None:
            super().pause_writing()
            self._stalled.set(patience.stalled_s)

        def resume_writing(self) -> None:
            super().resume_writing()
            self._stalled.cancel()

        def connection_lost(self, exc: Exception | None) -> None:
            self._head.end()
            self._stalled.end()
            super().connection_lost(exc)

        def handle_websocket_upgrade(self, event: Any) -> None:
            # From here on the other protocol keeps the time.
            self._head.end()
            self._stalled.end()
            super().handle_websocket_upgrade(event)

    return ImpatientHttp


def impatient_websocket(patience: Patience) -> type[WebSocketsSansIOProtocol]:
    """uvicorn's WebSocket protocol with deadlines and bounded buffers."""

    class ImpatientWebSocket(WebSocketsSansIOProtocol):
        def connection_made(self, transport: BaseTransport) -> None:
            super().connection_made(transport)
            self._handshake, self._stalled, self._linger = (_Deadline(transport) for _ in range(3))
            self._handshake.set(patience.head_s)

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            if self.handshake_complete:
                self._handshake.cancel()

        async def send(self, message: Any) -> None:
            await super().send(message)
            if self.handshake_complete:
                self._handshake.cancel()

        def pause_writing(self) -> None:
            super().pause_writing()
            self._stalled.set(patience.stalled_s)

        def resume_writing(self) -> None:
            super().resume_writing()
            self._stalled.cancel()

        def handle_ping(self) -> None:
            super().handle_ping()
            # Pongs are written whether or not anybody reads them.
            if self.transport.get_write_buffer_size() > MAX_BUFFER_BYTES:
                self.transport.abort()

        def handle_cont(self, event: Frame) -> None:
            # Empty pieces add nothing to a message's size, which is bounded, but something to the list of them. Older
            # uvicorns, such as the one that Flower asks for, join pieces as they come and have no such list.
            pieces: list[bytes] = getattr(self, "frames", [])
            if len(pieces) >= MAX_FRAGMENTS and not self.close_sent:
                pieces.clear()
                self.conn.fail(CloseCode.MESSAGE_TOO_BIG, "too many fragments")
                self.handle_parser_exception()
                return
            super().handle_cont(event)

        def on_task_complete(self, task: asyncio.Task[None]) -> None:
            super().on_task_complete(task)
            # The application is done; a peer that reads nothing must not hold on to the connection.
            self._linger.set(LINGER_S)

        def shutdown(self) -> None:
            # uvicorn says goodbye also to a peer that has just said it and has bytes left to read. websockets refuses
            # that, and the server's own end would end in the middle.
            is_ending = self.handshake_complete and not self.close_sent and self.conn.state is not State.OPEN
            if not is_ending:
                super().shutdown()
                return
            self.queue.put_nowait({"type": "websocket.disconnect", "code": CloseCode.SERVICE_RESTART.value})
            self.transport.close()

        def connection_lost(self, exc: Exception | None) -> None:
            for deadline in (self._handshake, self._stalled, self._linger):
                deadline.end()
            super().connection_lost(exc)

    return ImpatientWebSocket

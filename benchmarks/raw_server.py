"""A WebSocket server without a cloud behind it: the product's own server, and one handler for every connection."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress

from starlette.applications import Starlette
from starlette.routing import WebSocketRoute
from starlette.websockets import WebSocket

from cotune.cloud.asgi_connection import AsgiConnection
from cotune.errors import ConnectionLostError
from cotune.wire.asgi_server import ServerConfig, run_server
from cotune.wire.transport import Connection


@asynccontextmanager
async def raw_server(handle: Callable[[Connection], Awaitable[None]]) -> AsyncIterator[str]:
    """The URL of a server on a free port that hands each connection to `handle`."""

    async def answer(websocket: WebSocket) -> None:
        await websocket.accept()
        connection = AsgiConnection(websocket)
        with suppress(ConnectionLostError):
            await handle(connection)
        await connection.close()

    stop, ready = asyncio.Event(), asyncio.get_running_loop().create_future()
    config = ServerConfig(with_websockets=True, grace_s=1.0)
    application = Starlette(routes=[WebSocketRoute("/", answer)])
    task = asyncio.create_task(run_server(application, config, on_ready=ready.set_result, stop=stop))
    try:
        yield config.url("ws", await ready)
    finally:
        stop.set()
        await task

"""Sessions behind an ASGI server, over real sockets."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import uvicorn
from toy import toy_model
from websockets.asyncio.client import connect as open_websocket
from websockets.exceptions import InvalidStatus

from cotune.cloud.service import CloudService
from cotune.cloud.session_app import session_app
from cotune.errors import ConnectionLostError, RefusedError
from cotune.openai_api.bearer import BearerTokens
from cotune.wire.frame import MAX_FRAME_BYTES
from cotune.wire.frames import Hello, Welcome, decode, encode
from cotune.wire.websocket import connect

pytestmark = pytest.mark.integration


@asynccontextmanager
async def running(tokens: BearerTokens | None = None) -> AsyncIterator[str]:
    service = CloudService(toy_model())
    config = uvicorn.Config(
        session_app(service, tokens), port=0, ws="websockets-sansio", log_level="critical", lifespan="off"
    )
    server = uvicorn.Server(config)
    task = asyncio.create_task(server.serve())
    while not server.started:
        await asyncio.sleep(0.01)
    try:
        yield f"ws://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        await task
        service.close()


async def test_a_device_is_answered() -> None:
    async with running() as url:
        connection = await connect(url)
        await connection.send(encode(Hello()))
        assert isinstance(decode(await connection.receive(5)), Welcome)
        await connection.close()


async def test_a_token_is_asked_for() -> None:
    async with running(BearerTokens(["s3cret"])) as url:
        for token in (None, "guess"):
            with pytest.raises(RefusedError, match="does not accept the token"):
                await connect(url, token=token)
        connection = await connect(url, token="s3cret")
        await connection.close()


async def test_web_pages_are_refused() -> None:
    async with running() as url:
        with pytest.raises(InvalidStatus) as caught:
            await open_websocket(url, origin="http://127.0.0.1")  # type: ignore[arg-type]
        assert caught.value.response.status_code == 403


@pytest.mark.parametrize("message", ["text", bytes(MAX_FRAME_BYTES + 1)])
async def test_what_is_no_frame_ends_the_connection(message: str | bytes) -> None:
    async with running() as url:
        websocket = await open_websocket(url, compression=None)
        await websocket.send(message)
        await asyncio.wait_for(websocket.wait_closed(), 5)
        assert websocket.close_code == (1003 if isinstance(message, str) else 1009)
        # The others are unharmed.
        connection = await connect(url)
        await connection.send(encode(Hello()))
        assert isinstance(decode(await connection.receive(5)), Welcome)
        await connection.close()
        with pytest.raises(ConnectionLostError):
            await connection.receive(1)

"""Sessions behind an ASGI server, over real sockets."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from clouds import fronted
from toy import toy_model
from websockets.asyncio.client import connect as open_websocket

from cotune.cloud.service import CloudService
from cotune.errors import ConnectionLostError
from cotune.wire.frame import MAX_FRAME_BYTES
from cotune.wire.frames import Hello, Welcome, decode, encode
from cotune.wire.websocket import connect

pytestmark = pytest.mark.integration


@asynccontextmanager
async def running() -> AsyncIterator[str]:
    async with fronted(CloudService(toy_model())) as url:
        yield url


async def test_a_device_is_answered() -> None:
    async with running() as url:
        connection = await connect(url)
        await connection.send(encode(Hello()))
        assert isinstance(decode(await connection.receive(5)), Welcome)
        await connection.close()


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

"""What goes wrong between a device and its cloud, one fault at a time: the text is always the undisturbed one."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from urllib.parse import urlsplit

import numpy as np
import pytest
from clouds import restartable
from tiny_models import device_for, random_plugin, tiny_backbone

from cotune.cloud.hosted import HostedModel
from cotune.device.client import ClientConfig, CloudClient
from cotune.device.stream import DeviceStream
from cotune.generation.reference import generate
from cotune.generation.request import ANSWERS, GenerationRequest
from cotune.models.backbone import Backbone
from cotune.plugin import Plugin
from cotune.wire.transport import Connection
from cotune.wire.websocket import connect

pytestmark = pytest.mark.integration

STUBBORN = ClientConfig(timeout_s=30, first_backoff_s=0.005, max_backoff_s=0.05, max_attempts=200)
NUM_TOKENS = 24


class ByteRelay:
    """A TCP relay that tears a connection after a number of bytes, wherever in a frame that is."""

    def __init__(self, target: str, seed: int, least: int, most: int) -> None:
        parts = urlsplit(target)
        assert parts.hostname is not None and parts.port is not None
        self._target = parts.hostname, parts.port
        self._rng = random.Random(seed)
        self._range = least, most
        self._tasks: set[asyncio.Task[None]] = set()
        self.num_torn = 0
        self.url = ""

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.url = f"ws://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        try:
            yield
        finally:
            server.close()
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        far_reader, far_writer = await asyncio.open_connection(*self._target)
        left = [self._rng.randint(*self._range)]

        async def copy(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
            while left[0] > 0 and (data := await source.read(512)):
                part = data[: max(0, left[0])]
                left[0] -= len(data)
                sink.write(part)
                await sink.drain()

        copies = [asyncio.create_task(copy(reader, far_writer)), asyncio.create_task(copy(far_reader, writer))]
        try:
            await asyncio.wait(copies, return_when=asyncio.FIRST_COMPLETED)
        finally:
            self.num_torn += left[0] <= 0
            for one in copies:
                one.cancel()
            await asyncio.gather(*copies, return_exceptions=True)
            for one in (writer, far_writer):
                one.transport.abort()
            self._tasks.discard(task)


def request_for(backbone: Backbone, seed: int) -> GenerationRequest:
    return GenerationRequest(
        prompt_ids=np.random.default_rng(seed).integers(2, backbone.spec.vocab_size, 9),
        max_new_tokens=NUM_TOKENS,
        stop_token_ids=backbone.spec.eos_token_ids,
    )


def stream_for(backbone: Backbone, plugin: Plugin, request: GenerationRequest, **options: str) -> DeviceStream:
    shape = backbone.description.num_taps, backbone.description.tap_dim
    return DeviceStream(request, device_for(plugin).personal, tap_shape=shape, window=8, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("answer", ANSWERS)
async def test_a_connection_that_tears_in_the_middle_of_a_frame(answer: str) -> None:
    backbone = tiny_backbone("llama")
    plugin = random_plugin(backbone, 1.0)
    async with restartable(HostedModel.of(backbone)) as cloud:
        # Greeting and opening take about 2 kB; after that, anywhere.
        relay = ByteRelay(cloud.url, seed=1, least=2500, most=9000)
        async with relay.running():
            for seed in range(3):
                request = request_for(backbone, seed)
                expected = generate(backbone, device_for(plugin).personal, request)
                stream = stream_for(backbone, plugin, request, answer=answer)
                async with CloudClient(lambda: connect(relay.url), STUBBORN) as client:
                    await client.generate(stream)
                assert stream.token_ids == expected.token_ids
    assert relay.num_torn >= 2


async def test_two_devices_with_the_same_plugin() -> None:
    """The same person on two devices at once, with the same and with another request."""
    backbone = tiny_backbone("llama")
    plugin = random_plugin(backbone, 1.0)
    requests = [request_for(backbone, seed) for seed in (5, 5, 6)]
    async with restartable(HostedModel.of(backbone)) as cloud:

        async def run(request: GenerationRequest) -> list[int]:
            async with CloudClient(cloud.connect) as client:
                stream = stream_for(backbone, plugin, request)
                await client.generate(stream)
                return stream.token_ids

        texts = await asyncio.gather(*(run(request) for request in requests))
    for request, text in zip(requests, texts, strict=True):
        assert text == generate(backbone, device_for(plugin).personal, request).token_ids


async def test_a_restart_in_the_middle_of_a_sentence() -> None:
    backbone = tiny_backbone("llama")
    plugin = random_plugin(backbone, 1.0)
    request = request_for(backbone, 7)
    async with restartable(HostedModel.of(backbone)) as cloud:
        stream = stream_for(backbone, plugin, request)
        restarts: list[asyncio.Task[None]] = []

        def restart(_: object) -> None:
            if len(stream.decisions) in (4, 11) and len(restarts) < 2:
                restarts.append(asyncio.create_task(cloud.restart()))

        async def connector() -> Connection:
            return await connect(cloud.url)

        async with CloudClient(connector, STUBBORN) as client:
            await client.generate(stream, restart)
        await asyncio.gather(*restarts)
    assert cloud.num_restarts >= 1
    assert stream.token_ids == generate(backbone, device_for(plugin).personal, request).token_ids


async def test_a_full_cloud_is_come_back_to() -> None:
    """A second device waits, as the cloud asks it to, until the first one's text is complete."""
    from cotune.cloud.engine import EngineConfig
    from cotune.cloud.service import CloudService, ServiceConfig
    from cotune.errors import RefusedError
    from cotune.wire.inprocess import connection_pair

    backbone = tiny_backbone("llama")
    plugin = random_plugin(backbone, 1.0)
    # One block of 64 tokens: room for one session of 33.
    service = CloudService(HostedModel.of(backbone), ServiceConfig(engine=EngineConfig(max_blocks=1)))
    tasks: list[asyncio.Task[None]] = []

    async def connector() -> Connection:
        device, cloud = connection_pair()
        tasks.append(asyncio.create_task(service.handle(cloud)))
        return device

    requests = [request_for(backbone, seed) for seed in (1, 2)]

    async def run(request: GenerationRequest, patience_s: float) -> list[int]:
        async with CloudClient(connector, ClientConfig(busy_patience_s=patience_s)) as client:
            stream = stream_for(backbone, plugin, request, schedule="blocking")
            await client.generate(stream)
            return stream.token_ids

    try:
        first = asyncio.create_task(run(requests[0], 0.0))
        while not service.sessions:
            await asyncio.sleep(0.001)
        with pytest.raises(RefusedError, match=r"the cloud's cache has 0 free blocks and this session needs 1"):
            await run(requests[1], 0.0)
        second = await run(requests[1], 20.0)
        texts = [await first, second]
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        service.close()
    for request, text in zip(requests, texts, strict=True):
        assert text == generate(backbone, device_for(plugin).personal, request).token_ids

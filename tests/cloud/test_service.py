"""The service and the client over real connections: the same token ids, several devices at once, bad manners."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import numpy as np
import pytest
from clouds import fronted
from toy import STOP, TAP_DIM, TAPS, VOCAB, ToyBackbone, toy_model, toy_personal
from virtual_network import toy_prompt

from cotune.cloud.service import CloudService, ServiceConfig
from cotune.device.client import ClientConfig, CloudClient
from cotune.device.stream import DeviceStream
from cotune.errors import ConnectionLostError, InputError, RefusedError
from cotune.generation.reference import generate
from cotune.generation.request import ANSWERS, SCHEDULES, GenerationRequest
from cotune.wire.emulator import EmulatedConnection, NetworkProfile
from cotune.wire.frames import (
    Ack,
    AnswerCode,
    AssetKind,
    Error,
    ErrorCode,
    Hello,
    ModeCode,
    Open,
    Opened,
    ScheduleCode,
    Welcome,
    decode,
    encode,
)
from cotune.wire.inprocess import connection_pair
from cotune.wire.transport import Connection
from cotune.wire.websocket import connect

Connector = Callable[[], Awaitable[Connection]]


@asynccontextmanager
async def in_process(service: CloudService) -> AsyncIterator[Connector]:
    tasks: list[asyncio.Task[None]] = []

    async def connector() -> Connection:
        device, cloud = connection_pair()
        tasks.append(asyncio.create_task(service.handle(cloud)))
        return device

    try:
        yield connector
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        service.close()


@asynccontextmanager
async def over_websocket(service: CloudService) -> AsyncIterator[Connector]:
    async with fronted(service) as url:
        yield lambda: connect(url)


def _request(seed: int, mode: str = "integration", **changes: object) -> GenerationRequest:
    return GenerationRequest(
        prompt_ids=toy_prompt(seed), mode=mode, stop_token_ids=(STOP,), **{"max_new_tokens": 16, **changes}
    )


def _stream(request: GenerationRequest, personal: object = None, **options: object) -> DeviceStream:
    return DeviceStream(request, personal or toy_personal(0.3), tap_shape=(TAPS, TAP_DIM), **options)  # type: ignore


@pytest.mark.parametrize("transport", [in_process, over_websocket])
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("answer", ANSWERS)
async def test_token_ids_equal_the_reference(transport: object, schedule: str, answer: str) -> None:
    served = transport(CloudService(toy_model()))  # type: ignore[operator]
    async with served as connector, CloudClient(connector) as client:
        for seed, mode in enumerate(("integration", "spa", "separation", "ladder")):
            request = _request(seed, mode)
            stream = _stream(request, schedule=schedule, answer=answer)
            await client.generate(stream)
            assert stream.token_ids == generate(ToyBackbone(), toy_personal(0.3), request).token_ids


@pytest.mark.parametrize("answer", ANSWERS)
async def test_bad_networks_change_no_token(answer: str) -> None:
    profile = NetworkProfile(
        delay_ms=1.0, jitter_ms=1.0, duplicate_probability=0.2, disconnect_every_frames=60, bandwidth_mbps=50.0
    )
    async with over_websocket(CloudService(toy_model())) as connector:
        num_connections = 0

        async def badly() -> Connection:
            nonlocal num_connections
            num_connections += 1
            return EmulatedConnection(await connector(), profile, seed=num_connections)

        config = ClientConfig(first_backoff_s=0.001, max_backoff_s=0.01)
        for seed in range(4):
            request = _request(seed, max_new_tokens=30)
            stream = _stream(request, answer=answer)
            async with CloudClient(badly, config) as client:
                await client.generate(stream)
            assert stream.token_ids == generate(ToyBackbone(), toy_personal(0.3), request).token_ids
        assert num_connections > 5


async def test_many_devices_each_get_their_own_text() -> None:
    async with over_websocket(CloudService(toy_model())) as connector:

        async def one(number: int) -> None:
            personal = toy_personal(0.5, seed=number)
            request = _request(number, max_new_tokens=20)
            stream = _stream(request, personal, answer=ANSWERS[number % 2], schedule=SCHEDULES[number % 3])
            async with CloudClient(connector) as client:
                await client.generate(stream)
            assert stream.token_ids == generate(ToyBackbone(), personal, request).token_ids

        await asyncio.gather(*(one(number) for number in range(16)))


async def test_sessions_are_dropped_after_a_while_and_not_before() -> None:
    service = CloudService(toy_model(), ServiceConfig(session_ttl_s=0.2))
    async with in_process(service) as connector:
        async with CloudClient(connector) as client:
            await client.generate(_stream(_request(1)))
        assert len(service.sessions) == 1
        await asyncio.sleep(0.4)
        assert not service.sessions


async def test_a_ticket_opens_its_own_session_only() -> None:
    service = CloudService(toy_model())
    async with in_process(service) as connector:
        first = await _opened(connector, _open(1))
        stolen = _open(1, resume=True, session=first.session, ticket=bytes(16))
        other = await _opened(connector, stolen)
        assert other.session != first.session
        assert other.ticket != first.ticket
        own = _open(1, resume=True, session=first.session, ticket=first.ticket)
        assert (await _opened(connector, own)).session == first.session


async def test_features_and_assets_come_as_they_are() -> None:
    model = toy_model()
    async with over_websocket(CloudService(model)) as connector, CloudClient(connector) as client:
        assert client.description == model.description
        assert await client.fetch(AssetKind.TOKENIZER) == model.tokenizer_json
        assert await client.fetch(AssetKind.OUTPUT_BASIS) == model.output_basis.to_bytes()
        ids = np.arange(3, 20)
        here, there = ToyBackbone().features(ids, 4, 8), await client.features(ids, 4, 8)
        for name in here.__dataclass_fields__:
            assert np.array_equal(getattr(here, name), getattr(there, name)), name


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"prompt_ids": np.array([VOCAB])}, "token id 97 came, expected ids below 97"),
        ({"max_new_tokens": 600}, "expected at most 512 together"),
        ({"generated_ids": np.arange(3, 30)}, "27 tokens were generated already"),
        ({"gate_weights": np.ones(5, np.float32)}, "the gate has 5 weights, expected 12"),
        (
            {
                "gate_weights": np.ones(2, np.float32),
                "gate_layer": np.ones((2, 7), np.float16),
                "gate_layer_bias": np.ones(2, np.float32),
            },
            "the gate has 7 weights, expected 12",
        ),
        ({"mode": ModeCode.SPA}, "needs a gate"),
        ({"schedule": ScheduleCode.GATED}, "needs a gate"),
    ],
)
async def test_requests_that_cannot_be_served_are_refused_in_one_sentence(
    change: dict[str, object], words: str
) -> None:
    async with in_process(CloudService(toy_model())) as connector:
        with pytest.raises(RefusedError, match=words):
            await _opened(connector, _open(1, **change))


async def test_a_full_cloud_says_busy_and_serves_again_later() -> None:
    async with in_process(CloudService(toy_model(), ServiceConfig(max_sessions=1))) as connector:
        running = await _greeted(connector)
        await running.send(encode(_open(1, schedule=ScheduleCode.BLOCKING)))
        decode(await running.receive(5))
        with pytest.raises(RefusedError, match="takes no more") as caught:
            await _opened(connector, _open(2))
        assert caught.value.code == ErrorCode.BUSY


@pytest.mark.parametrize(
    "data", [b"", b"x", bytes(16), b"\xff" * 40, encode(Ack(session=1, pos=2)), encode(Hello(version=9))]
)
async def test_nonsense_instead_of_a_hello_is_answered_and_hung_up_on(data: bytes) -> None:
    async with in_process(CloudService(toy_model())) as connector:
        connection = await connector()
        await connection.send(data)
        answer = decode(await connection.receive(5))
        assert isinstance(answer, Error)
        with pytest.raises(ConnectionLostError):
            await connection.receive(5)


async def test_a_silent_device_is_sent_away() -> None:
    async with in_process(CloudService(toy_model(), ServiceConfig(idle_timeout_s=0.05))) as connector:
        connection = await connector()
        answer = decode(await connection.receive(5))
        assert isinstance(answer, Error) and answer.code is ErrorCode.TIMEOUT


async def test_stale_and_foreign_frames_disturb_nobody() -> None:
    async with in_process(CloudService(toy_model())) as connector, CloudClient(connector) as client:
        connection = client._connection
        assert connection is not None
        for frame in (Ack(session=99, pos=3), Ack(session=0, pos=2**31, epoch=7)):
            await connection.send(encode(frame))
        request = _request(2)
        stream = _stream(request)
        await client.generate(stream)
        assert stream.token_ids == generate(ToyBackbone(), toy_personal(0.3), request).token_ids


def test_limits_are_checked() -> None:
    with pytest.raises(InputError, match="max_sessions"):
        ServiceConfig(max_sessions=0)


def _open(seed: int, **changes: object) -> Open:
    fields: dict[str, object] = {
        "mode": ModeCode.INTEGRATION,
        "schedule": ScheduleCode.OPTIMISTIC,
        "answer": AnswerCode.TOKEN,
        "prompt_ids": toy_prompt(seed),
        "max_new_tokens": 8,
    }
    return Open(**{**fields, **changes})  # type: ignore[arg-type]


async def _greeted(connector: Connector) -> Connection:
    connection = await connector()
    await connection.send(encode(Hello()))
    assert isinstance(decode(await connection.receive(5)), Welcome)
    return connection


async def _opened(connector: Connector, frame: Open) -> Opened:
    connection = await _greeted(connector)
    await connection.send(encode(frame))
    answer = decode(await connection.receive(5))
    if isinstance(answer, Error):
        raise RefusedError(answer.code, answer.message)
    assert isinstance(answer, Opened)
    return answer

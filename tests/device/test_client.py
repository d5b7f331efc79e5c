"""The client against clouds that are silent, broken, hostile or gone."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from toy import STOP, TAP_DIM, TAPS, ToyBackbone, toy_model, toy_personal
from virtual_network import toy_prompt

from cotune.cloud.service import CloudService
from cotune.device.client import MAX_ASSET_BYTES, ClientConfig, CloudClient
from cotune.device.stream import DeviceStream
from cotune.errors import (
    ConnectionLostError,
    FrameError,
    InputError,
    MismatchError,
    RefusedError,
    WireError,
    WireTimeoutError,
)
from cotune.generation.reference import generate
from cotune.generation.request import ANSWERS, Decision, GenerationRequest
from cotune.wire.codec import pack_taps, quantise
from cotune.wire.emulator import EmulatedConnection, NetworkProfile
from cotune.wire.frames import (
    Asset,
    AssetKind,
    AssetRequest,
    End,
    EndReason,
    Error,
    ErrorCode,
    Features,
    FeaturesRequest,
    Frame,
    Hello,
    Open,
    Opened,
    Step,
    Welcome,
    decode,
    encode,
)
from cotune.wire.inprocess import connection_pair
from cotune.wire.recorder import RecordingConnection
from cotune.wire.transport import Connection

Behaviour = Callable[[Connection], Awaitable[None]]
HASTY = ClientConfig(timeout_s=0.1, max_attempts=3, first_backoff_s=0.001, max_backoff_s=0.002)
WELCOME = Welcome(info=toy_model().description.to_info())


class Cloud:
    """Connects to `behave`, one task for each connection; keeps what it gave away."""

    def __init__(self, behave: Behaviour) -> None:
        self._behave = behave
        self.tasks: list[asyncio.Task[None]] = []
        self.connections: list[Connection] = []
        self.connected_at_s: list[float] = []

    async def connect(self) -> Connection:
        self.connected_at_s.append(asyncio.get_running_loop().time())
        device, cloud = connection_pair()
        self.connections.append(device)
        self.tasks.append(asyncio.create_task(self._serve(cloud)))
        return device

    async def _serve(self, connection: Connection) -> None:
        try:
            await self._behave(connection)
        except ConnectionLostError:
            pass
        finally:
            await connection.close()


@asynccontextmanager
async def cloud_that(behave: Behaviour) -> AsyncIterator[Cloud]:
    cloud = Cloud(behave)
    yield cloud
    for task in cloud.tasks:
        task.cancel()
    await asyncio.gather(*cloud.tasks, return_exceptions=True)


@asynccontextmanager
async def toy_cloud() -> AsyncIterator[Cloud]:
    service = CloudService(toy_model())
    async with cloud_that(service.handle) as cloud:
        yield cloud
    service.close()


def answering(answers: dict[type[Frame], list[Frame]], *, then_close: bool = False) -> Behaviour:
    """Welcomes, then answers each frame by its type; silent otherwise."""

    async def behave(connection: Connection) -> None:
        while True:
            frame = decode(await connection.receive(60))
            for reply in {Hello: [WELCOME], **answers}.get(type(frame), []):
                await connection.send(encode(reply))
            if then_close and not isinstance(frame, Hello):
                return

    return behave


def _stream(seed: int = 1, **options: Any) -> DeviceStream:
    request = GenerationRequest(prompt_ids=toy_prompt(seed), stop_token_ids=(STOP,), max_new_tokens=16)
    return DeviceStream(request, toy_personal(0.3), tap_shape=(TAPS, TAP_DIM), **options)


def _expected(stream: DeviceStream) -> list[int]:
    return generate(ToyBackbone(), toy_personal(0.3), stream.request).token_ids


@pytest.mark.parametrize("name", ["timeout_s", "max_attempts", "first_backoff_s", "max_backoff_s"])
def test_patience_is_positive(name: str) -> None:
    with pytest.raises(InputError, match=f"{name} is 0, expected a number above 0"):
        ClientConfig(**{name: 0})


def test_nothing_is_known_before_the_first_connection() -> None:
    client = CloudClient(lambda: pytest.fail())
    with pytest.raises(InputError, match="not connected yet"):
        _ = client.description


# Silence.


async def test_a_cloud_that_never_welcomes_is_waited_for_so_long_and_no_longer() -> None:
    async def silent(connection: Connection) -> None:
        await connection.receive(60)
        await asyncio.Event().wait()

    async with cloud_that(silent) as cloud:
        loop = asyncio.get_running_loop()
        started_s = loop.time()
        with pytest.raises(WireTimeoutError, match=r"nothing came within 0\.1 s"):
            await CloudClient(cloud.connect, HASTY).__aenter__()
        assert 0.1 <= loop.time() - started_s < 2
        assert len(cloud.connections) == 1 and cloud.connections[0].closed


@pytest.mark.parametrize("answers", [{}, {Open: [Opened(session=7, pos=5, ticket=bytes(16))]}])
async def test_a_cloud_that_falls_silent_is_given_up(answers: dict[type[Frame], list[Frame]]) -> None:
    async with cloud_that(answering(answers)) as cloud, CloudClient(cloud.connect, HASTY) as client:
        with pytest.raises(WireTimeoutError):
            await client.generate(_stream())
        for ask in (client.fetch(AssetKind.TOKENIZER), client.features(np.arange(3, 9), 2, 4)):
            with pytest.raises(WireTimeoutError):
                await ask


@pytest.mark.parametrize("num_steps", [0, 1])
async def test_frames_that_say_nothing_do_not_count_as_an_answer(num_steps: int) -> None:
    taps = pack_taps(*quantise(np.ones((TAPS, TAP_DIM), np.float32)))

    async def chatty(connection: Connection) -> None:
        await connection.receive(60)
        await connection.send(encode(WELCOME))
        await connection.send(encode(Opened(session=7, pos=5, ticket=bytes(16))))
        for _ in range(num_steps):
            await connection.send(encode(Step(session=7, pos=5, base_token=3, taps=taps)))
        while True:
            await connection.send(encode(End(session=99, reason=EndReason.LENGTH)))
            await asyncio.sleep(0.01)

    async with cloud_that(chatty) as cloud, CloudClient(cloud.connect, HASTY) as client:
        async with asyncio.timeout(5):
            with pytest.raises(WireTimeoutError):
                await client.generate(_stream())


# Broken connections.


async def test_it_gives_up_after_so_many_attempts_in_a_row() -> None:
    async def hangs_up(connection: Connection) -> None:
        await connection.receive(60)
        await connection.send(encode(WELCOME))
        await connection.receive(60)

    async with cloud_that(hangs_up) as cloud, CloudClient(cloud.connect, HASTY) as client:
        with pytest.raises(ConnectionLostError):
            await client.generate(_stream())
        # The first attempt ran on the connection that was there already.
        assert len(cloud.connections) == HASTY.max_attempts
        assert all(connection.closed for connection in cloud.connections)


async def test_a_cloud_that_is_gone_is_tried_again_more_and_more_slowly() -> None:
    loop = asyncio.get_running_loop()
    attempts_s: list[float] = []
    async with toy_cloud() as cloud:

        async def once() -> Connection:
            attempts_s.append(loop.time())
            if len(attempts_s) > 1:
                raise ConnectionLostError("no cloud answers at ws://gone")
            return EmulatedConnection(await cloud.connect(), NetworkProfile(disconnect_every_frames=6))

        config = ClientConfig(timeout_s=5, max_attempts=6, first_backoff_s=0.02, max_backoff_s=0.08)
        async with CloudClient(once, config) as client:
            stream = _stream()
            with pytest.raises(ConnectionLostError, match="no cloud answers"):
                await client.generate(stream)
            assert client.num_reconnects == len(attempts_s) - 1
    # The first failure is the cut; then each try in vain is one more. Waits are drawn from half to all of the longest.
    waits_s = np.diff(attempts_s)[-5:]
    assert len(attempts_s) == 6
    for wait_s, longest_s in zip(waits_s[1:], (0.04, 0.08, 0.08, 0.08), strict=True):
        assert longest_s / 2 <= wait_s


def test_a_device_may_try_for_ever() -> None:
    client = CloudClient(lambda: pytest.fail(), ClientConfig(first_backoff_s=0.01, max_backoff_s=2.0))
    assert all(1.0 <= client._backoff_s(failures) <= 2.0 for failures in (9, 1025, 10**9))


@pytest.mark.parametrize("num_frames", [9, 10, 11, 12])
@pytest.mark.parametrize("answer", ANSWERS)
async def test_tokens_between_two_cuts_are_progress_and_no_failure(answer: str, num_frames: int) -> None:
    """More cuts than attempts are allowed, but never so many in a row."""
    async with toy_cloud() as cloud:

        async def badly() -> Connection:
            profile = NetworkProfile(disconnect_every_frames=num_frames)
            return EmulatedConnection(await cloud.connect(), profile, seed=len(cloud.connections))

        config = ClientConfig(timeout_s=5, max_attempts=2, first_backoff_s=0.001, max_backoff_s=0.002)
        shown: list[Decision] = []
        stream = _stream(schedule="blocking", answer=answer)
        async with CloudClient(badly, config) as client:
            await client.generate(stream, shown.append)
            assert client.num_reconnects > config.max_attempts
    assert stream.token_ids == _expected(stream)
    # Each token is shown once, in order, whatever happened to the connection.
    assert shown == stream.decisions


async def test_a_cloud_that_hosts_another_model_after_a_reconnect_is_refused() -> None:
    async with toy_cloud() as cloud:

        async def changing() -> Connection:
            if not cloud.connections:
                return EmulatedConnection(await cloud.connect(), NetworkProfile(disconnect_every_frames=6))
            device, other = connection_pair()
            info = replace(toy_model().description, model="other", backbone_digest="c" * 64).to_info()
            await other.send(encode(Welcome(info=info)))
            return device

        async with CloudClient(changing, HASTY) as client:
            with pytest.raises(MismatchError, match=r"hosted toy .* and hosts other .* now; start the generation anew"):
                await client.generate(_stream())


# Refusals and nonsense.


@pytest.mark.parametrize(
    ("first", "error", "words"),
    [
        (Error(code=ErrorCode.BUSY, message="full; later"), RefusedError, "the cloud refused: full; later"),
        (Welcome(version=1, info=WELCOME.info), FrameError, "speaks protocol 1, expected 3; install the same"),
        (Welcome(info={}), FrameError, "has model = None, expected str"),
        (Welcome(info={**WELCOME.info, "num_taps": 0}), FrameError, "num_taps = 0"),
        (Opened(session=1, ticket=bytes(16)), FrameError, "first frame is a Opened, expected a Welcome"),
    ],
)
async def test_a_bad_greeting_ends_the_visit_at_once(first: Frame, error: type[WireError], words: str) -> None:
    async with cloud_that(answering({Hello: [first]})) as cloud:
        with pytest.raises(error, match=words):
            await CloudClient(cloud.connect, HASTY).__aenter__()
        assert len(cloud.connections) == 1 and cloud.connections[0].closed


async def test_a_refusal_is_not_tried_again_and_keeps_its_code() -> None:
    refusal = Error(code=ErrorCode.TOO_LARGE, message="the prompt is too long")
    answers: dict[type[Frame], list[Frame]] = {kind: [refusal] for kind in (Open, AssetRequest, FeaturesRequest)}
    async with cloud_that(answering(answers)) as cloud, CloudClient(cloud.connect, HASTY) as client:
        for ask in (
            client.generate(_stream()),
            client.fetch(AssetKind.TOKENIZER),
            client.features(np.arange(3, 9), 2, 4),
        ):
            with pytest.raises(RefusedError, match="the cloud refused: the prompt is too long") as caught:
                await ask
            assert caught.value.code == ErrorCode.TOO_LARGE
        assert len(cloud.connections) == 1


async def test_bytes_that_are_no_frame_are_an_error_of_their_own() -> None:
    async def babbles(connection: Connection) -> None:
        await connection.receive(60)
        await connection.send(b"\xff" * 40)

    async with cloud_that(babbles) as cloud:
        with pytest.raises(FrameError):
            await CloudClient(cloud.connect, HASTY).__aenter__()
        assert cloud.connections[0].closed


async def test_a_cloud_that_ends_too_early_is_an_error() -> None:
    end = [Opened(session=7, pos=5, ticket=bytes(16)), End(session=7, reason=EndReason.CANCELLED)]
    async with cloud_that(answering({Open: end})) as cloud, CloudClient(cloud.connect, HASTY) as client:
        with pytest.raises(WireError, match=r"ended the session \(cancelled\) after 0 tokens"):
            await client.generate(_stream())


@pytest.mark.parametrize(
    ("asset", "words"),
    [
        (Asset(pos=0, total_bytes=MAX_ASSET_BYTES + 1, chunk=b"x"), f"{MAX_ASSET_BYTES + 1} bytes announced"),
        (Asset(pos=2, total_bytes=9, chunk=b"x"), "asset bytes from 2 came, expected bytes from 0 on"),
        (Asset(pos=0, total_bytes=9, chunk=b""), "expected bytes from 0 on"),
    ],
)
async def test_assets_that_cannot_be_are_refused(asset: Asset, words: str) -> None:
    async with cloud_that(answering({AssetRequest: [asset]})) as cloud, CloudClient(cloud.connect, HASTY) as client:
        with pytest.raises(FrameError, match=words):
            await client.fetch(AssetKind.OUTPUT_BASIS)


async def test_an_asset_comes_in_pieces() -> None:
    data = bytes(range(100))

    async def in_tens(connection: Connection) -> None:
        await connection.receive(60)
        await connection.send(encode(WELCOME))
        while True:
            ask = decode(await connection.receive(60))
            assert isinstance(ask, AssetRequest)
            chunk = data[ask.pos : ask.pos + 10]
            await connection.send(encode(Asset(pos=ask.pos, total_bytes=len(data), chunk=chunk)))

    async with cloud_that(in_tens) as cloud, CloudClient(cloud.connect, HASTY) as client:
        assert await client.fetch(AssetKind.TOKENIZER) == data


@pytest.mark.parametrize(
    ("features", "words"),
    [
        (Features(pos=2, num_targets=0, packed=b""), "without targets"),
        (Features(pos=2, num_targets=4, packed=b"short"), "features"),
        (Features(pos=2, num_targets=400, packed=bytes(4000)), "features"),
    ],
)
async def test_features_that_cannot_be_are_refused(features: Features, words: str) -> None:
    behave = answering({FeaturesRequest: [features]})
    async with cloud_that(behave) as cloud, CloudClient(cloud.connect, HASTY) as client:
        with pytest.raises(FrameError, match=words):
            await client.features(np.arange(3, 9), 2, 4)


# Bookkeeping.


async def test_bytes_are_counted_as_they_pass() -> None:
    async with toy_cloud() as cloud:
        made: list[RecordingConnection] = []

        async def recorded() -> Connection:
            made.append(RecordingConnection(await cloud.connect()))
            return made[-1]

        async with CloudClient(recorded) as client:
            await client.generate(_stream())
            # All but the greeting, which belongs to the connection and to no generation.
            assert client.bytes_sent == sum(map(len, made[0].sent[1:]))
            assert client.bytes_received == sum(map(len, made[0].received[1:]))


async def test_closing_is_thorough_and_may_be_repeated() -> None:
    async with toy_cloud() as cloud:
        async with CloudClient(cloud.connect) as client:
            await client.generate(_stream())
            await client.close()
            assert cloud.connections[0].closed
            # The next use connects anew.
            stream = _stream(2)
            await client.generate(stream)
            assert stream.token_ids == _expected(stream)
        await client.close()
        assert len(cloud.connections) == 2 and cloud.connections[1].closed

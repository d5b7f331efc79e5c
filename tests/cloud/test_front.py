"""The cloud's front over real sockets: the official client, metrics, limits, and people who behave badly."""

from __future__ import annotations

import asyncio
import json
import resource
import socket
import ssl
import struct
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
import trustme
from asgi import ask
from clouds import get
from tiny_models import device_for, random_plugin, tiny_backbone

from cotune.cloud.engine import EngineConfig
from cotune.cloud.front import FrontConfig, front
from cotune.cloud.host import HostConfig, host
from cotune.cloud.hosted import HostedModel
from cotune.cloud.service import CloudService, ServiceConfig
from cotune.device.client import ClientConfig, CloudClient
from cotune.device.stream import DeviceStream
from cotune.errors import ConnectionLostError, RefusedError, WireError
from cotune.generation.reference import generate
from cotune.generation.request import GenerationRequest
from cotune.generation.sampling import Sampling
from cotune.generation.text import TextCodec
from cotune.models.backbone import Backbone
from cotune.openai_api.bearer import BearerTokens
from cotune.wire.codes import ErrorCode
from cotune.wire.frames import Error, FeaturesRequest, Hello, Opened, Welcome, decode, encode
from cotune.wire.transport import Connection
from cotune.wire.websocket import connect

pytestmark = pytest.mark.integration

TOKEN = "a-token-that-nobody-guesses"
UPGRADE = (
    b"GET / HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n"
)
PROMPT = "Please turn off the living room lights."


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return tiny_backbone("llama")


@asynccontextmanager
async def hosted(backbone: Backbone, **options: Any) -> AsyncIterator[str]:
    """The URL of a cloud on a free port; when it ends nothing may be left."""
    model = HostedModel.of(backbone)
    model = replace(model, description=replace(model.description, stop_token_ids=()))
    stop, ready = asyncio.Event(), asyncio.get_running_loop().create_future()
    config = HostConfig(**{"port": 0, "drain_s": 0.2, **options})
    task = asyncio.create_task(host(model, config, on_ready=ready.set_result, stop=stop))
    await asyncio.wait({task, ready}, return_when=asyncio.FIRST_COMPLETED)
    if task.done():
        await task
    try:
        yield await ready
    finally:
        stop.set()
        await asyncio.wait_for(task, 20)


_made: list[openai.AsyncOpenAI] = []


@pytest.fixture(autouse=True)
async def _close_clients() -> AsyncIterator[None]:
    yield
    while _made:
        await _made.pop().close()


def client(url: str, token: str = "none") -> openai.AsyncOpenAI:
    _made.append(
        openai.AsyncOpenAI(base_url=url.replace("ws", "http", 1) + "/v1", api_key=token, max_retries=0, timeout=20)
    )
    return _made[-1]


def expected_text(backbone: Backbone, prompt: str, num: int, sampling: Sampling | None = None) -> str:
    text = TextCodec(backbone.tokenizer_json)
    request = GenerationRequest(
        prompt_ids=text.encode_prompt(prompt), max_new_tokens=num, sampling=sampling or Sampling()
    )
    return text.decode(generate(backbone, None, request).token_ids)


# Everything that the test itself asks of the backbone comes before a cloud uses it: it belongs to one thread at a time.


def stream_for(backbone: Backbone, seed: int, num: int = 16) -> tuple[DeviceStream, list[int]]:
    personal = device_for(random_plugin(backbone, 1.0, seed)).personal
    prompt = np.random.default_rng(seed).integers(2, backbone.spec.vocab_size, 7)
    request = GenerationRequest(prompt_ids=prompt, max_new_tokens=num)
    shape = backbone.description.num_taps, backbone.description.tap_dim
    return DeviceStream(request, personal, tap_shape=shape), generate(backbone, personal, request).token_ids


async def check_control(made: tuple[DeviceStream, list[int]], url: str, **options: Any) -> None:
    """A device that behaves gets its own text."""
    stream, expected = made
    async with CloudClient(lambda: connect(url, **options)) as device:
        await device.generate(stream)
    assert stream.token_ids == expected


async def metrics(url: str) -> dict[str, float]:
    _, body = await get(url, "/metrics")
    lines = (line.rpartition(" ") for line in body.splitlines() if line[0] != "#")
    return {name: float(number) for name, _, number in lines}


async def metric(url: str, name: str) -> float:
    """Of all labels together."""
    return sum(number for key, number in (await metrics(url)).items() if key.partition("{")[0] == name)


async def until(measure: Callable[[], Awaitable[float]], value: float, timeout_s: float = 10.0) -> None:
    async with asyncio.timeout(timeout_s):
        while await measure() != value:
            await asyncio.sleep(0.05)


async def test_the_official_client_gets_the_plain_backbone(backbone: Backbone) -> None:
    greedy = expected_text(backbone, PROMPT, 12)
    drawn = expected_text(backbone, PROMPT, 12, Sampling(temperature=0.7, top_p=0.9, seed=11))
    answer = expected_text(backbone, "User: Hello\nAssistant:", 5)
    async with hosted(backbone) as url:
        openai_client = client(url)
        names = [model.id async for model in openai_client.models.list()]
        assert names == [backbone.description.model]
        asked = {"model": names[0], "prompt": PROMPT, "max_tokens": 12}
        whole = await openai_client.completions.create(**asked, temperature=0)
        assert whole.choices[0].text == greedy
        assert (whole.choices[0].finish_reason, whole.usage.completion_tokens) == ("length", 12)
        pieces = [
            chunk.choices[0].text
            async for chunk in await openai_client.completions.create(**asked, temperature=0, stream=True)
            if chunk.choices
        ]
        assert "".join(pieces) == whole.choices[0].text
        sampled = await openai_client.completions.create(**asked, temperature=0.7, top_p=0.9, seed=11)
        assert sampled.choices[0].text == drawn
        chat = await openai_client.chat.completions.create(
            model=names[0], messages=[{"role": "user", "content": "Hello"}], max_tokens=5, temperature=0, logprobs=True
        )
        assert chat.choices[0].message.content == answer
        assert all(token.logprob <= 0 for token in chat.choices[0].logprobs.content)
        stop = whole.choices[0].text[3:6]
        cut = await openai_client.completions.create(**asked, temperature=0, stop=stop)
        assert cut.choices[0].text == whole.choices[0].text.partition(stop)[0]
        with pytest.raises(openai.NotFoundError, match="model is 'other'"):
            await openai_client.completions.create(model="other", prompt="x")
        with pytest.raises(openai.BadRequestError, match="expected fewer than 128, the context"):
            await openai_client.completions.create(model=names[0], prompt="lights " * 200)
        assert await metric(url, "cotune_kv_blocks_used") == 0


async def test_plain_texts_and_devices_share_the_batch(backbone: Backbone) -> None:
    prompts = [f"Wake me up at {i}" for i in range(4)]
    texts = [expected_text(backbone, prompt, 20) for prompt in prompts]
    made = [stream_for(backbone, seed) for seed in range(4)]
    async with hosted(backbone) as url:
        openai_client = client(url)

        async def plain(prompt: str) -> str:
            made = await openai_client.completions.create(
                model=backbone.description.model, prompt=prompt, max_tokens=20, temperature=0
            )
            return made.choices[0].text

        devices = [check_control(one, url) for one in made]
        *_, a, b, c, d = await asyncio.gather(*devices, *(plain(prompt) for prompt in prompts))
        assert [a, b, c, d] == texts
        assert await metric(url, "cotune_row_steps_total") > await metric(url, "cotune_passes_total")
        assert await metric(url, "cotune_bytes_total") > 0


async def test_health_metrics_and_who_may_see_them(backbone: Backbone, tmp_path: Path) -> None:
    tokens = tmp_path / "tokens.txt"
    tokens.write_text(TOKEN + "\n", encoding="utf-8")
    made = stream_for(backbone, 3)
    async with hosted(backbone, token_file=tokens) as url:
        assert await get(url, "/healthz") == (200, "ok\n")
        status, body = await get(url, "/metrics")
        assert status == 401 and "a valid bearer token is needed" in json.loads(body)["error"]["message"]
        status, body = await get(url, "/metrics", TOKEN)
        assert status == 200
        # Every line is a comment or a name with a number: what Prometheus reads.
        for line in body.splitlines():
            assert line.startswith("# ") or float(line.rpartition(" ")[2]) >= 0
        with pytest.raises(openai.AuthenticationError):
            await client(url, "wrong").models.list()
        assert [model.id async for model in client(url, TOKEN).models.list()]
        await check_control(made, url, token=TOKEN)
        for name in ("Origin", "Sec-Fetch-Site"):
            status, _ = await get(url, "/v1/models", TOKEN, **{name: "https://evil.example"})
            assert status == 403


async def test_metrics_tell_what_happened(backbone: Backbone) -> None:
    personal = device_for(random_plugin(backbone, 1.0, 5)).personal
    prompt = np.random.default_rng(5).integers(2, backbone.spec.vocab_size, 7)
    request = GenerationRequest(prompt_ids=prompt, max_new_tokens=60)
    shape = backbone.description.num_taps, backbone.description.tap_dim
    stream = DeviceStream(request, personal, tap_shape=shape, schedule="optimistic", window=8)
    service = ServiceConfig(engine=EngineConfig(max_blocks=40))
    async with hosted(backbone, service=service) as url:
        connections: list[Connection] = []

        async def connector() -> Connection:
            connections.append(await connect(url))
            return connections[-1]

        under_way = asyncio.Event()
        async with CloudClient(connector) as device:
            task = asyncio.create_task(device.generate(stream, lambda _: under_way.set()))
            await asyncio.wait_for(under_way.wait(), 10)
            busy = await metrics(url)
            await task
        await until(lambda: metric(url, "cotune_connections"), 0)
        after = await metrics(url)
    assert busy['cotune_sessions{state="connected"}'] == busy["cotune_connections"] == busy["cotune_rows"] == 1
    assert busy["cotune_kv_blocks_used"] > 0 and busy["cotune_batch_rows"] == 1
    assert after['cotune_sessions{state="connected"}'] == after['cotune_sessions{state="away"}'] == 0
    assert after["cotune_kv_blocks_used"] == after["cotune_rows"] == after["cotune_draining"] == 0
    assert after["cotune_kv_blocks"] == 40 and after["cotune_rows_are_independent"] == int(
        backbone.rows_are_independent
    )
    counters = stream.cloud_counters
    assert counters is not None
    assert after["cotune_wasted_steps_total"] == counters["num_wasted_steps"] != 0
    assert after["cotune_rollbacks_total"] == counters["num_rollbacks"] != 0
    assert after["cotune_prompt_tokens_total"] == len(prompt)
    # A pass for each token kept or thrown away; the prompt's gives the first one.
    assert after["cotune_row_steps_total"] == after["cotune_passes_total"] >= 60
    assert after["cotune_stall_seconds_total"] > 0 and after["cotune_queue_seconds_total"] > 0
    assert 0 < after["cotune_busy_seconds_total"] < 30
    assert after['cotune_bytes_total{way="up"}'] == sum(one.bytes_sent for one in connections)
    assert after['cotune_bytes_total{way="down"}'] >= sum(one.bytes_received for one in connections) > 0


async def test_an_owner_is_who_holds_the_token_however_it_is_written(backbone: Backbone) -> None:
    service = CloudService(HostedModel.of(backbone), ServiceConfig(max_sessions_per_token=1, requests_per_minute=3))
    tokens = BearerTokens(["ann", "bob"])
    app = front(service, FrontConfig(tokens=tokens))
    body = {"model": backbone.description.model, "prompt": "x", "max_tokens": 1}

    async def status(authorization: str, method: str = "POST", path: str = "/v1/completions") -> int:
        sent = body if method == "POST" else None
        return (await ask(app, method, path, sent, headers={"authorization": authorization})).status

    try:
        ann = tokens.holder(["Bearer ann"])
        assert ann is not None
        with service.text_place(ann):
            assert await status("bearer   ann") == 429
            assert await status("Bearer bob") == 200
            with pytest.raises(RefusedError, match="1 sessions run with this token, expected at most 1"):
                service.open_session(stream_for(backbone, 1)[0].open_frame(), ann)
        assert [await status(written) for written in ("Bearer ann", "bearer ann", "BEARER  ann")] == [200, 200, 429]
        assert await status("Bearer ann", "GET", "/v1/models") == 200
        assert await status("Bearer eve") == 401
        assert service.totals().answers == {200: 4, 401: 1, 429: 2}
        assert service.totals().refusals == {"rate_limit_exceeded": 2, "invalid_api_key": 1}
        reply = await ask(app, "GET", "/metrics", headers={"authorization": "Bearer bob"})
        assert b'cotune_answers_total{status="429"} 2\n' in reply.body
    finally:
        service.close()


async def test_limits_of_a_token(backbone: Backbone, tmp_path: Path) -> None:
    tokens = tmp_path / "tokens.txt"
    tokens.write_text("ann\nbob\n", encoding="utf-8")
    service = ServiceConfig(max_sessions_per_token=1, requests_per_minute=4)
    impatient = ClientConfig(busy_patience_s=0.0)
    held, _ = stream_for(backbone, 1, num=100)
    bobs, more = [stream_for(backbone, seed) for seed in (3, 4)], [stream_for(backbone, s, num=2)[0] for s in range(7)]
    async with hosted(backbone, token_file=tokens, service=service) as url:
        async with CloudClient(lambda: connect(url, token="ann"), impatient) as first:
            task = asyncio.create_task(first.generate(held, lambda _: under_way.set()))
            under_way = asyncio.Event()
            await asyncio.wait_for(under_way.wait(), 10)
            async with CloudClient(lambda: connect(url, token="ann"), impatient) as second:
                with suppress(RefusedError):
                    await second.generate(more.pop())
                    assert task.done()
            await check_control(bobs.pop(), url, token="bob")
            await task
        await asyncio.sleep(0)
        refused = 0
        for one in more:
            try:
                async with CloudClient(lambda: connect(url, token="ann"), impatient) as device:
                    await device.generate(one)
            except RefusedError as error:
                assert error.retry_after_s is not None and "more than 4 requests a minute" in error.reason
                refused += 1
        assert refused >= 3
        await check_control(bobs.pop(), url, token="bob")
        with pytest.raises(openai.RateLimitError):
            for _ in range(5):
                await client(url, "ann").completions.create(model=backbone.description.model, prompt="x", max_tokens=1)


async def test_wrong_ways_in_leave_the_others_alone(backbone: Backbone, tmp_path: Path) -> None:
    """Plain text to a TLS port and back, garbage, a frame of 2 GB, endless headers: refused, others unharmed."""
    first, second = stream_for(backbone, 3), stream_for(backbone, 4)
    authority = trustme.CA()
    issued = authority.issue_cert("127.0.0.1")
    paths = {name: tmp_path / f"{name}.pem" for name in ("ca", "cert", "key")}
    authority.cert_pem.write_to_path(paths["ca"])
    issued.private_key_pem.write_to_path(paths["key"])
    issued.cert_chain_pems[0].write_to_path(paths["cert"])
    async with hosted(backbone, tls_cert=paths["cert"], tls_key=paths["key"]) as url:
        control = asyncio.create_task(check_control(first, url, tls_ca=paths["ca"]))
        with pytest.raises(WireError):
            await connect(url.replace("wss", "ws"), timeout_s=5)
        with pytest.raises(WireError, match="is not trusted"):
            await connect(url)
        reader, writer = await asyncio.open_connection("127.0.0.1", int(url.rpartition(":")[2]))
        writer.write(UPGRADE)
        answer = b""
        with suppress(ConnectionError):
            answer = await asyncio.wait_for(reader.read(), 10)
        assert b"HTTP" not in answer
        writer.close()
        await control
    async with hosted(backbone) as url:
        port = int(url.rpartition(":")[2])
        with pytest.raises((ssl.SSLError, ConnectionError, OSError)):
            await asyncio.open_connection("127.0.0.1", port, ssl=ssl.create_default_context())
        for garbage in (b"\x16\x03\x01" + bytes(500), b"GET / HTTP/1.1\r\n" + b"X: y\r\n" * 20_000, bytes(70_000)):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            with suppress(ConnectionError):
                writer.write(garbage)
                await writer.drain()
                answer = await asyncio.wait_for(reader.read(), 15)
                assert b" 200 " not in answer[:20]
            writer.close()
        before_kib = peak_kib()
        assert await announce_2_gb(port) == b"\x88" + (1009).to_bytes(2)
        assert peak_kib() - before_kib < 50_000
        await check_control(second, url)
        assert await metric(url, "cotune_sessions") == 0


async def announce_2_gb(port: int) -> bytes:
    """What answers to a WebSocket whose first frame says that it has 2 GB: kind of frame and code."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(UPGRADE)
    await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 10)
    writer.write(b"\x82\xff" + (2**31).to_bytes(8) + bytes(4) + bytes(1000))
    kind, _, *code = await asyncio.wait_for(reader.readexactly(4), 10)
    writer.close()
    return bytes([kind, *code])


def peak_kib() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def masked(payload: bytes) -> bytes:
    """A client's binary WebSocket message."""
    size = bytes([0x80 | len(payload)]) if len(payload) < 126 else b"\xfe" + len(payload).to_bytes(2)
    return b"\x82" + size + bytes(4) + payload


async def test_a_reader_of_a_byte_now_and_then_is_hung_up_on(backbone: Backbone) -> None:
    made = stream_for(backbone, 3)
    service = ServiceConfig(slow_reader_timeout_s=1.0, max_outbox_bytes=20_000)
    ids = np.random.default_rng(0).integers(2, 300, 120)
    asked = masked(encode(FeaturesRequest(input_ids=ids, pos=1, top_k=400, want_hidden=True)))
    async with hosted(backbone, service=service) as url:
        before_kib, loop = peak_kib(), asyncio.get_running_loop()
        with socket.socket() as slow:
            slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            slow.connect(("127.0.0.1", int(url.rpartition(":")[2])))
            slow.setblocking(False)
            await loop.sock_sendall(slow, UPGRADE)
            assert (await loop.sock_recv(slow, 1000)).startswith(b"HTTP/1.1 101")
            await loop.sock_sendall(slow, masked(encode(Hello())) + 60 * asked)
            await until(lambda: metric(url, "cotune_connections"), 1)

            async def sip() -> None:
                while await loop.sock_recv(slow, 1):
                    await asyncio.sleep(0.5)

            sipping = asyncio.create_task(sip())
            try:
                await check_control(made, url)
                # Nobody here closes it.
                await until(lambda: metric(url, "cotune_connections"), 0, timeout_s=15)
            finally:
                sipping.cancel()
                await asyncio.gather(sipping, return_exceptions=True)
        assert peak_kib() - before_kib < 100_000


async def test_who_says_nothing_is_hung_up_on(backbone: Backbone) -> None:
    made = stream_for(backbone, 3)
    async with hosted(backbone, service=ServiceConfig(idle_timeout_s=0.5)) as url:
        silent = await connect(url)
        await check_control(made, url)
        frame = decode(await silent.receive(5))
        assert isinstance(frame, Error) and frame.code == ErrorCode.TIMEOUT
        with pytest.raises(ConnectionLostError):
            await silent.receive(5)


async def test_thousands_who_come_and_go(backbone: Backbone, request: pytest.FixtureRequest) -> None:
    num = int(request.config.getoption("--connects"))
    first, second, third = (stream_for(backbone, seed) for seed in (3, 4, 5))
    async with hosted(backbone) as url:
        port = int(url.rpartition(":")[2])
        await check_control(first, url)
        before_kib, loop = peak_kib(), asyncio.get_running_loop()
        control = asyncio.create_task(check_control(second, url))
        # Some say nothing, some half a head, some are let in, some greet: and all are gone at once.
        for i in range(num):
            with socket.socket() as one:
                one.connect(("127.0.0.1", port))
                one.sendall((b"", UPGRADE[:40], UPGRADE, UPGRADE)[i % 4])
                if i % 8 >= 4:  # cut rather than closed
                    one.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                if i % 4 == 3:
                    one.setblocking(False)
                    assert (await loop.sock_recv(one, 1000)).startswith(b"HTTP/1.1 101")
                    await loop.sock_sendall(one, masked(encode(Hello())))
            if i % 16 == 15:
                await asyncio.sleep(0)
        await asyncio.wait_for(control, 60)
        await until(lambda: metric(url, "cotune_connections"), 0, timeout_s=30)
        assert (await get(url, "/healthz"))[0] == 200
        assert peak_kib() - before_kib < 100_000
        await check_control(third, url)


async def test_a_prompt_longer_than_the_context_is_refused(backbone: Backbone) -> None:
    made = stream_for(backbone, 2)
    for num_prompt, num_new in ((7, 200), (150, 4)):
        stream = stream_for(backbone, 1, num=1)[0]
        prompt_ids = np.random.default_rng(1).integers(2, backbone.spec.vocab_size, num_prompt)
        stream.request = replace(stream.request, prompt_ids=prompt_ids, max_new_tokens=num_new)
        async with hosted(backbone) as url, CloudClient(lambda url=url: connect(url)) as device:
            with pytest.raises(RefusedError, match=f"the prompt has {num_prompt} .* expected at most 128 together"):
                await device.generate(stream)
            assert await metric(url, "cotune_kv_blocks_used") == await metric(url, "cotune_sessions") == 0
            if num_prompt == 150:
                await check_control(made, url)


@pytest.mark.parametrize("kind", ["expired", "foreign", "never given"])
async def test_a_ticket_that_opens_nothing(backbone: Backbone, kind: str) -> None:
    """It costs nobody anything: the device goes on from what it holds, in a session of its own."""
    stream, expected = stream_for(backbone, 2)
    ttl_s = 0.05 if kind == "expired" else 30.0
    async with hosted(backbone, service=ServiceConfig(session_ttl_s=ttl_s)) as url:
        connection = await connect(url)
        for frame in (Hello(), stream.open_frame()):
            await connection.send(encode(frame))
        assert isinstance(decode(await connection.receive(5)), Welcome)
        opened = decode(await connection.receive(5))
        assert isinstance(opened, Opened)
        if kind == "expired":
            await connection.close()
            await until(lambda: metric(url, "cotune_sessions"), 0)
        stream.session, stream._ticket = opened.session, opened.ticket
        if kind == "foreign":
            stream._ticket = bytes(one ^ 1 for one in opened.ticket)
        elif kind == "never given":
            stream.session, stream._ticket = opened.session ^ 1, b"x" * 16
        frame = stream.open_frame()
        assert frame.resume and frame.session == stream.session
        async with CloudClient(lambda: connect(url)) as device:
            await device.generate(stream)
        assert stream.token_ids == expected
        assert stream.session != opened.session
        if kind != "expired":
            # The other one's session, of the same prompt, is still its own.
            assert (await metrics(url))['cotune_sessions{state="connected"}'] == 1 and not connection.closed
            await connection.close()

"""The cloud's front over real sockets: the official client, metrics, limits, and people who behave badly."""

from __future__ import annotations

import asyncio
import json
import resource
import socket
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
import trustme
from tiny_models import device_for, random_plugin, tiny_backbone

from cotune.cloud.engine import EngineConfig
from cotune.cloud.host import HostConfig, host
from cotune.cloud.hosted import HostedModel
from cotune.cloud.service import ServiceConfig
from cotune.device.client import ClientConfig, CloudClient
from cotune.device.stream import DeviceStream
from cotune.errors import ConnectionLostError, RefusedError, WireError
from cotune.generation.reference import generate
from cotune.generation.request import GenerationRequest
from cotune.generation.sampling import Sampling
from cotune.generation.text import TextCodec
from cotune.models.backbone import Backbone
from cotune.wire.frames import FeaturesRequest, Hello, Open, decode, encode
from cotune.wire.websocket import connect

pytestmark = pytest.mark.integration

TOKEN = "a-token-that-nobody-guesses"
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


async def get(url: str, path: str, token: str | None = None, **headers: str) -> tuple[int, str]:
    """Status and body of a plain request."""
    host_, port = url.rpartition("/")[2].split(":")
    reader, writer = await asyncio.open_connection(host_, int(port))
    if token is not None:
        headers["Authorization"] = f"Bearer {token}"
    lines = [f"GET {path} HTTP/1.1", "Host: x", "Connection: close", *(f"{k}: {v}" for k, v in headers.items())]
    writer.write(("\r\n".join(lines) + "\r\n\r\n").encode())
    answer = (await asyncio.wait_for(reader.read(), 10)).decode()
    writer.close()
    head, _, body = answer.partition("\r\n\r\n")
    return int(head.split()[1]), body


async def metric(url: str, name: str) -> float:
    _, body = await get(url, "/metrics")
    return sum(float(line.rpartition(" ")[2]) for line in body.splitlines() if line.startswith(name) and line[0] != "#")


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
        assert await announce_2_gb(port) in (b"", b"\x88")
        await check_control(second, url)
        assert await metric(url, "cotune_sessions") == 0


async def announce_2_gb(port: int) -> bytes:
    """A WebSocket whose first frame says that it has 2 GB; the first byte of what comes back."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(
        b"GET / HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n"
    )
    await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 10)
    writer.write(b"\x82\xff" + (2**31).to_bytes(8, "big") + bytes(4) + bytes(1000))
    first = b""
    with suppress(ConnectionError):
        first = await asyncio.wait_for(reader.read(1), 10)
    writer.close()
    return first


async def test_slow_readers_and_slow_writers_are_hung_up_on(backbone: Backbone) -> None:
    made = stream_for(backbone, 3)
    service = ServiceConfig(slow_reader_timeout_s=0.5, idle_timeout_s=1.0, max_outbox_bytes=20_000)
    async with hosted(backbone, service=service) as url:
        # It asks for features, much, and reads nothing of it.
        connection = await connect(url)
        await connection.send(encode(Hello()))
        with suppress(ConnectionLostError):
            for _ in range(200):
                ids = np.random.default_rng(0).integers(2, 300, 120)
                await asyncio.wait_for(
                    connection.send(encode(FeaturesRequest(input_ids=ids, pos=1, top_k=400, want_hidden=True))), 0.5
                )
        control = asyncio.create_task(check_control(made, url))
        # It sends a request's head, one byte now and then.
        _, writer = await asyncio.open_connection("127.0.0.1", int(url.rpartition(":")[2]))
        await control
        with suppress(ConnectionError):
            for byte in b"GET /healthz HTTP/1.1\r\n"[:6]:
                writer.write(bytes([byte]))
                await asyncio.sleep(0.05)
        writer.close()
        await connection.close()
        for _ in range(100):
            if await metric(url, "cotune_connections") == 0:
                break
            await asyncio.sleep(0.1)
        assert await metric(url, "cotune_connections") == 0


async def test_thousands_who_come_and_go(backbone: Backbone, request: pytest.FixtureRequest) -> None:
    num = int(request.config.getoption("--connects"))
    first, second = stream_for(backbone, 3), stream_for(backbone, 4)
    async with hosted(backbone) as url:
        port = int(url.rpartition(":")[2])
        await check_control(first, url)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        control = asyncio.create_task(check_control(second, url))
        for i in range(num):
            with socket.socket() as one:
                one.setblocking(False)
                with suppress(BlockingIOError):
                    one.connect(("127.0.0.1", port))
                if i % 50 == 0:
                    await asyncio.sleep(0)
        await asyncio.wait_for(control, 30)
        await asyncio.sleep(0.2)
        assert (await get(url, "/healthz"))[0] == 200
        grown_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
        assert grown_kib < 100_000
        assert await metric(url, "cotune_connections") == 0


async def test_a_prompt_longer_than_the_context_and_a_foreign_ticket(backbone: Backbone) -> None:
    too_long = stream_for(backbone, 1, num=16)[0]
    too_long.request = replace(too_long.request, max_new_tokens=200)
    stream, expected = stream_for(backbone, 2)
    async with hosted(backbone, service=ServiceConfig(engine=EngineConfig(max_blocks=4))) as url:
        async with CloudClient(lambda: connect(url)) as device:
            with pytest.raises(RefusedError, match="expected at most 128 together, the context"):
                await device.generate(too_long)
        # A ticket that no session has: a new session, from what the device holds.
        frame = stream.open_frame()
        assert isinstance(decode(encode(replace(frame, resume=True, ticket=b"x" * 16, session=77))), Open)
        stream.session, stream._ticket = 77, b"x" * 16
        async with CloudClient(lambda: connect(url)) as device:
            await device.generate(stream)
        assert stream.token_ids == expected

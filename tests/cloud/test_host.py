"""The cloud behind a real socket: whom it lets in, how it stops, and what it refuses before it listens."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trustme
from toy import STOP, TAP_DIM, TAPS, ToyBackbone, toy_model, toy_personal
from virtual_network import toy_prompt

from cotune.cloud.host import HostConfig, host
from cotune.cloud.service import ServiceConfig
from cotune.device.client import ClientConfig, CloudClient
from cotune.device.stream import DeviceStream
from cotune.errors import ConnectionLostError, InputError, RefusedError, WireError
from cotune.generation.reference import generate
from cotune.generation.request import GenerationRequest
from cotune.wire.asgi_server import ServerConfig
from cotune.wire.codes import ErrorCode
from cotune.wire.websocket import connect

pytestmark = pytest.mark.integration

TOKEN = "a-token-that-nobody-guesses"


@asynccontextmanager
async def hosted(**options: Any) -> AsyncIterator[str]:
    """The URL of a cloud that listens on a free port."""
    stop = asyncio.Event()
    ready: asyncio.Future[str] = asyncio.get_running_loop().create_future()
    config = HostConfig(**{"port": 0, "drain_s": 0.05, **options})
    task = asyncio.create_task(host(toy_model(), config, on_ready=ready.set_result, stop=stop))
    done, _ = await asyncio.wait({task, ready}, return_when=asyncio.FIRST_COMPLETED)
    if task in done:
        await task
    try:
        yield await ready
    finally:
        stop.set()
        await task


@pytest.fixture(scope="module")
def tls(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("tls")
    authority = trustme.CA()
    issued = authority.issue_cert("localhost", "127.0.0.1")
    paths = {name: folder / f"{name}.pem" for name in ("ca", "cert", "key")}
    authority.cert_pem.write_to_path(paths["ca"])
    issued.private_key_pem.write_to_path(paths["key"])
    issued.cert_chain_pems[0].write_to_path(paths["cert"])
    return paths


@pytest.fixture
def token_file(tmp_path: Path) -> Path:
    path = tmp_path / "tokens.txt"
    path.write_text(f"# who may come in\n\n  {TOKEN}  \nanother-token\n", encoding="utf-8")
    return path


async def generate_over(url: str, **options: Any) -> None:
    """One generation, compared with the reference."""
    request = GenerationRequest(prompt_ids=toy_prompt(1), stop_token_ids=(STOP,), max_new_tokens=12)
    stream = DeviceStream(request, toy_personal(0.3), tap_shape=(TAPS, TAP_DIM))
    async with CloudClient(lambda: connect(url, **options)) as client:
        await client.generate(stream)
    assert stream.token_ids == generate(ToyBackbone(), toy_personal(0.3), request).token_ids


async def test_it_serves_until_it_is_stopped() -> None:
    async with hosted() as url:
        assert url.startswith("ws://127.0.0.1:") and not url.endswith(":0")
        await generate_over(url)
        left_open = await connect(url)
    with pytest.raises(ConnectionLostError):
        await left_open.receive(5)
    with pytest.raises(ConnectionLostError, match="no cloud answers"):
        await connect(url)


async def test_stopping_in_the_middle_of_a_text_is_a_lost_connection() -> None:
    decided = asyncio.Event()
    request = GenerationRequest(prompt_ids=toy_prompt(1), max_new_tokens=400)
    stream = DeviceStream(request, toy_personal(0.3), tap_shape=(TAPS, TAP_DIM), schedule="blocking")
    config = ClientConfig(timeout_s=5, max_attempts=2, first_backoff_s=0.001)
    async with hosted() as url:
        client = CloudClient(lambda: connect(url), config)
        task = asyncio.create_task(client.generate(stream, lambda decision: decided.set()))
        await asyncio.wait_for(decided.wait(), 5)
    with pytest.raises(ConnectionLostError):
        await task
    assert 0 < len(stream.decisions) < 400


async def test_tls_and_a_token(tls: dict[str, Path], token_file: Path) -> None:
    async with hosted(tls_cert=tls["cert"], tls_key=tls["key"], token_file=token_file) as url:
        assert url.startswith("wss://")
        for token in (TOKEN, "another-token"):
            await generate_over(url, token=token, tls_ca=tls["ca"])
        with pytest.raises(WireError, match=r"is not trusted: .*give its CA as tls_ca"):
            await connect(url, token=TOKEN)
        with pytest.raises(WireError, match="wss"):
            await connect(url.replace("wss:", "ws:"), token=TOKEN)


@pytest.mark.parametrize("token", [None, "wrong", TOKEN + "x", TOKEN[:-1], "who"])
async def test_a_wrong_token_is_refused_over_the_socket(token: str | None, token_file: Path) -> None:
    async with hosted(token_file=token_file) as url:
        with pytest.raises(RefusedError, match="does not accept the token; ask its host") as caught:
            await CloudClient(lambda: connect(url, token=token)).__aenter__()
        assert caught.value.code == ErrorCode.UNAUTHORISED
        await generate_over(url, token=TOKEN)


async def test_a_crowd_is_told_to_come_later() -> None:
    async with hosted(service=ServiceConfig(max_sessions=1)) as url:
        inside = [await connect(url) for _ in range(2)]
        with pytest.raises(RefusedError, match="too many connections") as caught:
            await connect(url)
        assert caught.value.code == ErrorCode.BUSY
        for connection in inside:
            await connection.close()


async def test_readers_of_answers_have_as_long_as_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    served: list[ServerConfig] = []

    async def run(application: Any, config: ServerConfig, *, on_ready: Any, **_: Any) -> None:
        served.append(config)

    monkeypatch.setattr("cotune.cloud.host.run_server", run)
    config = HostConfig(service=ServiceConfig(slow_reader_timeout_s=7.0))
    await host(toy_model(), config, on_ready=pytest.fail)
    assert [one.patience.stalled_s for one in served] == [7.0]


async def test_a_port_that_is_taken_is_named() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(InputError, match=f"cannot listen on 127.0.0.1, port {port}: address already in use"):
            async with hosted(port=port):
                pytest.fail()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"port": -1}, "port is -1, expected 0 to 65535"),
        ({"port": 65_536}, "port is 65536"),
        ({"host": "0.0.0.0"}, "which others can reach; give --tls-cert, --tls-key and --token-file"),
        ({"host": "::"}, "which others can reach"),
        ({"host": "llm.example", "tls_cert": Path("c"), "tls_key": Path("k")}, "which others can reach"),
        ({"host": "llm.example", "tls_cert": Path("c"), "token_file": Path("t")}, "which others can reach"),
    ],
)
def test_unsafe_or_impossible_places_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        HostConfig(**options)


@pytest.mark.parametrize("place", ["127.0.0.1", "localhost", "::1", "127.9.9.9"])
def test_loopback_needs_nothing(place: str) -> None:
    assert HostConfig(host=place).host == place


@pytest.mark.parametrize("missing", ["token_file", "tls_cert"])
async def test_files_that_are_missing_stop_it_before_it_listens(
    missing: str, tls: dict[str, Path], token_file: Path, tmp_path: Path
) -> None:
    options = {"tls_cert": tls["cert"], "tls_key": tls["key"], "token_file": token_file, missing: tmp_path / "none"}
    with pytest.raises(InputError, match="none"):
        async with hosted(**options):
            pytest.fail()

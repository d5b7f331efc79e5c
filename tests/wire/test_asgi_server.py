"""What a server refuses before it listens, its TLS, and how it ends."""

from __future__ import annotations

import asyncio
import ssl
import warnings
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trustme

from cotune.errors import InputError
from cotune.wire.asgi_server import ServerConfig, run_server

pytestmark = pytest.mark.integration


async def hello(scope: Any, receive: Any, send: Any) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
    await send({"type": "http.response.body", "body": b"ok"})


@asynccontextmanager
async def running(**options: Any) -> AsyncIterator[int]:
    """The port of a server."""
    stop, ready = asyncio.Event(), asyncio.get_running_loop().create_future()
    task = asyncio.create_task(run_server(hello, ServerConfig(**options), on_ready=ready.set_result, stop=stop))
    await asyncio.wait({task, ready}, return_when=asyncio.FIRST_COMPLETED)
    if task.done():
        await task
    try:
        yield await ready
    finally:
        stop.set()
        await asyncio.wait_for(task, 10)


@pytest.fixture(scope="module")
def tls(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("tls")
    authority = trustme.CA()
    issued = authority.issue_cert("127.0.0.1")
    paths = {name: folder / f"{name}.pem" for name in ("ca", "cert", "key", "text")}
    authority.cert_pem.write_to_path(paths["ca"])
    issued.private_key_pem.write_to_path(paths["key"])
    issued.cert_chain_pems[0].write_to_path(paths["cert"])
    paths["text"].write_text("no certificate", encoding="utf-8")
    return paths


@pytest.mark.parametrize(
    ("cert", "key", "message"),
    [
        ("cert", None, "TLS needs both"),
        (None, "key", "TLS needs both"),
        ("none", "none", "no such file"),
        ("text", "text", "unencrypted key in PEM"),
        ("cert", "ca", "unencrypted key in PEM"),
    ],
)
async def test_files_that_tls_cannot_use(tls: dict[str, Path], cert: str | None, key: str | None, message: str) -> None:
    files = [None if name is None else tls.get(name, Path("none.pem")) for name in (cert, key)]
    with pytest.raises(InputError, match=f"--tls-cert.*{message}|{message}"):
        async with running(tls_cert=files[0], tls_key=files[1]):
            pytest.fail("it must not start")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"port": 70_000}, "port is 70000, expected 0 to 65535"),
        ({"port": -1}, "port is -1"),
        ({"host": "cotune.invalid"}, "no such address"),
    ],
)
async def test_addresses_that_cannot_be_listened_on(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        async with running(**options):
            pytest.fail("it must not start")


async def test_an_address_is_not_shared() -> None:
    async with running() as port:
        with pytest.raises(InputError, match=f"port {port}: address already in use; choose another --port"):
            async with running(port=port):
                pytest.fail("it must not start")


async def test_tls_is_modern(tls: dict[str, Path]) -> None:
    async with running(tls_cert=tls["cert"], tls_key=tls["key"]) as port:
        context = ssl.create_default_context(cafile=tls["ca"])
        _, writer = await asyncio.open_connection("127.0.0.1", port, ssl=context)
        assert writer.get_extra_info("ssl_object").version() == "TLSv1.3"
        writer.transport.abort()
        with warnings.catch_warnings(action="ignore", category=DeprecationWarning):
            context.minimum_version, context.maximum_version = ssl.TLSVersion.TLSv1, ssl.TLSVersion.TLSv1_1
        context.set_ciphers("ALL:@SECLEVEL=0")
        with pytest.raises((ssl.SSLError, ConnectionError)):
            await asyncio.open_connection("127.0.0.1", port, ssl=context)


async def test_it_ends_at_once_when_nobody_is_there() -> None:
    loop = asyncio.get_running_loop()
    async with running():
        started_s = loop.time()
    assert loop.time() - started_s < 1.0


async def test_the_application_may_end_its_work_first() -> None:
    stop, ready = asyncio.Event(), asyncio.get_running_loop().create_future()
    answers: list[bytes] = []

    async def finish() -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", await ready)
        writer.write(b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        answers.append(await asyncio.wait_for(reader.read(), 5))
        writer.close()

    stop.set()
    await asyncio.wait_for(
        run_server(hello, ServerConfig(), on_ready=ready.set_result, stop=stop, before_end=finish), 10
    )
    assert answers[0].startswith(b"HTTP/1.1 200")

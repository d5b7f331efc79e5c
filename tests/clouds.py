"""Real clouds on loopback sockets: in this event loop, where they can be restarted, and in a thread of their own."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from queue import Queue
from typing import Any

from cotune.cloud.front import FrontConfig, front
from cotune.cloud.host import HostConfig, host
from cotune.cloud.hosted import HostedModel
from cotune.cloud.service import CloudService, ServiceConfig
from cotune.wire.asgi_server import ServerConfig, run_server
from cotune.wire.transport import Connection
from cotune.wire.websocket import connect


@asynccontextmanager
async def fronted(service: CloudService, config: FrontConfig | None = None, **server: Any) -> AsyncIterator[str]:
    """The URL of a service behind its front, on a free port; the service ends with it."""
    stop, ready = asyncio.Event(), asyncio.get_running_loop().create_future()
    where = ServerConfig(**{"with_websockets": True, "grace_s": 1.0, **server})
    task = asyncio.create_task(run_server(front(service, config), where, on_ready=ready.set_result, stop=stop))
    await asyncio.wait({task, ready}, return_when=asyncio.FIRST_COMPLETED)
    if task.done():
        await task
    try:
        yield where.url("ws", await ready)
    finally:
        stop.set()
        await asyncio.wait_for(task, 20)
        # The engine ends its work in hand before another one uses the backbone.
        service.close()


class RestartableCloud:
    """A service behind its front that may be replaced by a new one, which devices find by themselves."""

    def __init__(self, model: HostedModel, config: ServiceConfig | None = None) -> None:
        self._model = model
        self._config = config
        self._running = AsyncExitStack()
        self.url = ""
        self.num_restarts = 0

    async def start(self) -> None:
        # Any free port, again after a restart: the old one may be taken by now.
        self.url = await self._running.enter_async_context(fronted(CloudService(self._model, self._config)))

    async def stop(self) -> None:
        await self._running.aclose()

    async def restart(self) -> None:
        """All connections break, and the new service knows of no session."""
        await self.stop()
        await self.start()
        self.num_restarts += 1

    async def connect(self) -> Connection:
        return await connect(self.url)


@asynccontextmanager
async def restartable(model: HostedModel, config: ServiceConfig | None = None) -> AsyncIterator[RestartableCloud]:
    cloud = RestartableCloud(model, config)
    await cloud.start()
    try:
        yield cloud
    finally:
        await cloud.stop()


@contextmanager
def in_a_thread(model: HostedModel, config: HostConfig | None = None) -> Iterator[str]:
    """The URL of `host` at work in another thread, for devices that have no event loop."""
    config = config or HostConfig(port=0)
    ready: Queue[tuple[str, asyncio.AbstractEventLoop, asyncio.Event] | BaseException] = Queue()

    async def work() -> None:
        loop, stop = asyncio.get_running_loop(), asyncio.Event()
        await host(model, config, on_ready=lambda url: ready.put((url, loop, stop)), stop=stop)

    def run() -> None:
        try:
            asyncio.run(work())
        except BaseException as error:
            ready.put(error)

    thread = threading.Thread(target=run, name="cloud")
    thread.start()
    started = ready.get(timeout=30)
    if isinstance(started, BaseException):
        raise started
    url, loop, stop = started
    try:
        yield url
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join(timeout=30)
        assert not thread.is_alive()


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

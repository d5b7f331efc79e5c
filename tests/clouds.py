"""Real clouds on loopback sockets: in this event loop, where they can be restarted, and in a thread of their own."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from queue import Queue

from cotune.cloud.host import HostConfig, host
from cotune.cloud.hosted import HostedModel
from cotune.cloud.service import CloudService
from cotune.wire.transport import Connection
from cotune.wire.websocket import WebSocketServer, connect, serve


class RestartableCloud:
    """A service behind a WebSocket that may be replaced by a new one, which devices find by themselves."""

    def __init__(self, model: HostedModel) -> None:
        self._model = model
        self._service: CloudService | None = None
        self._server: WebSocketServer | None = None
        self.num_restarts = 0

    @property
    def url(self) -> str:
        assert self._server is not None
        return self._server.url

    async def start(self) -> None:
        self._service = CloudService(self._model)
        # Any free port, again after a restart: the old one may be taken by now.
        self._server = await serve(self._service.handle)

    async def stop(self) -> None:
        if self._server is not None and self._service is not None:
            await self._server.close()
            # The old engine ends its work in hand before another one uses the backbone.
            self._service.close()

    async def restart(self) -> None:
        """All connections break, and the new service knows of no session."""
        await self.stop()
        await self.start()
        self.num_restarts += 1

    async def connect(self) -> Connection:
        return await connect(self.url)


@asynccontextmanager
async def restartable(model: HostedModel) -> AsyncIterator[RestartableCloud]:
    cloud = RestartableCloud(model)
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

"""A network between a device and a toy cloud that is cut, falls silent, refuses and comes back when a test says so."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from typing import Any

from toy import toy_model

from cotune.cloud.hosted import HostedModel
from cotune.cloud.service import CloudService, ServiceConfig
from cotune.errors import ConnectionLostError, CotuneError
from cotune.wire.inprocess import connection_pair
from cotune.wire.transport import Connection, ConnectionWrapper


class Network:
    """Connects to a cloud.

    Attributes:
        error: what a new connection meets instead of a cloud; None for the cloud.
        is_silent: nothing arrives, in either direction, and no connection is made.
        is_mute: greetings are answered, and nothing else.
        cut_after: frames from the cloud after which the next one meets a cut.
        num_attempts, num_connections: that were begun, and made.
    """

    def __init__(self, model: HostedModel | None = None, config: ServiceConfig | None = None) -> None:
        self.model = model or endless_model()
        self.config = config
        self.service = CloudService(self.model, config)
        self.error: CotuneError | None = None
        self.is_silent = False
        self.is_mute = False
        self.cut_after: int | None = None
        self.num_attempts = 0
        self.num_connections = 0
        self.tasks: list[asyncio.Task[None]] = []
        self._lines: list[_Line] = []
        self._changed = asyncio.Event()

    async def connect(self) -> Connection:
        self.num_attempts += 1
        while self.is_silent:
            await self._wait()
        if self.error is not None:
            raise self.error
        self.num_connections += 1
        device, cloud = connection_pair()
        self.tasks.append(asyncio.create_task(self._serve(cloud)))
        line = _Line(device, self)
        self._lines.append(line)
        return line

    async def _serve(self, connection: Connection) -> None:
        with suppress(ConnectionLostError):
            await self.service.handle(connection)

    async def down(self, error: CotuneError | None = None) -> None:
        """Cut all connections; new ones meet `error`."""
        self.error = error or ConnectionLostError("no cloud answers: connection refused")
        for line in self._lines:
            await line.connection.close()
        self._lines.clear()

    def up(self) -> None:
        """Everything as it should be, for new connections."""
        self.error, self.is_silent, self.is_mute, self.cut_after = None, False, False, None
        self._changed.set()

    def silence(self) -> None:
        """From now on nothing arrives, and nobody is told."""
        self.is_silent = True

    def restart(self) -> None:
        """Another cloud of the same model, which knows of no session."""
        self.service.close()
        self.service = CloudService(self.model, self.config)

    @property
    def num_open(self) -> int:
        """Connections that nobody has closed."""
        return sum(not line.closed for line in self._lines)

    async def _wait(self) -> None:
        self._changed.clear()
        await self._changed.wait()

    async def close(self) -> None:
        for task in self.tasks:
            task.cancel()
        await asyncio.gather(*self.tasks, return_exceptions=True)
        self.service.close()


class _Line(ConnectionWrapper):
    """One connection over the network."""

    def __init__(self, connection: Connection, network: Network) -> None:
        super().__init__(connection)
        self._network = network
        self._num_received = 0

    async def send(self, data: bytes) -> None:
        if not self._network.is_silent:
            await self.connection.send(data)

    async def receive(self, timeout_s: float) -> bytes:
        network = self._network
        if network.cut_after is not None and self._num_received > network.cut_after:
            network.cut_after = None
            await network.down()
        data = await self.connection.receive(timeout_s)
        while network.is_silent or (network.is_mute and self._num_received > 0):
            await network._wait()
        self._num_received += 1
        return data


def endless_model(**description: Any) -> HostedModel:
    """The toy model, which never ends a text by itself."""
    model = toy_model()
    return replace(model, description=replace(model.description, **{"stop_token_ids": (), **description}))


@asynccontextmanager
async def broken_network(
    model: HostedModel | None = None, config: ServiceConfig | None = None
) -> AsyncIterator[Network]:
    network = Network(model, config)
    try:
        yield network
    finally:
        network.up()
        await network.close()

"""A device's service over a real cloud, both on loopback sockets in threads of their own."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from queue import Queue
from typing import Any, Generic, TypeVar

from clouds import in_a_thread
from toy import toy_model
from toy_plugin import toy_plugin

from cotune.cloud.hosted import HostedModel
from cotune.device.client import ClientConfig
from cotune.device.runtime import GenerationOptions
from cotune.device.serve.personal_source import PersonalSource
from cotune.device.serve.server import ServeConfig, serve
from cotune.device.serve.source import DeviceSource
from cotune.ledger import EgressLedger
from cotune.plugin import Plugin
from cotune.wire.emulator import EmulatedConnection, NetworkProfile
from cotune.wire.ledgered import LedgeredConnection
from cotune.wire.transport import Connection
from cotune.wire.websocket import connect

MODEL = "my-plugin"


S = TypeVar("S", bound=DeviceSource)


@dataclass(frozen=True)
class Service(Generic[S]):
    """A service at work."""

    url: str
    source: S
    ledger: EgressLedger


def source_of(
    cloud_url: str, ledger: EgressLedger, *, plugin: Plugin | None = None, rtt_ms: float = 0.0, **defaults: Any
) -> PersonalSource:
    """The toy plugin's source, over an emulated network."""

    async def connector() -> Connection:
        connection = await connect(cloud_url)
        if rtt_ms:
            connection = EmulatedConnection(connection, NetworkProfile(delay_ms=rtt_ms / 2), 0)
        return LedgeredConnection(connection, ledger, "serve")

    return PersonalSource(
        plugin or toy_plugin(),
        connector,
        model_id=MODEL,
        defaults=GenerationOptions(**{"max_new_tokens": 12, **defaults}),
        config=ClientConfig(timeout_s=10, max_attempts=2),
    )


def endless_model() -> HostedModel:
    """The toy model, which never ends a text by itself."""
    model = toy_model()
    return replace(model, description=replace(model.description, stop_token_ids=()))


@contextmanager
def serving(
    config: ServeConfig | None = None,
    *,
    model: HostedModel | None = None,
    plugin: Plugin | None = None,
    rtt_ms: float = 0.0,
    **defaults: Any,
) -> Iterator[Service[PersonalSource]]:
    """A cloud and a device's service over it, until the block ends."""
    ledger = EgressLedger(None)
    with in_a_thread(model or toy_model()) as cloud_url:
        source = source_of(cloud_url, ledger, plugin=plugin, rtt_ms=rtt_ms, **defaults)
        with serving_source(source, ledger, config) as service:
            yield service


@contextmanager
def serving_source(source: S, ledger: EgressLedger, config: ServeConfig | None = None) -> Iterator[Service[S]]:
    """Any source's service, until the block ends."""
    ready: Queue[tuple[str, asyncio.AbstractEventLoop, asyncio.Event] | BaseException] = Queue()

    async def work() -> None:
        loop, stop = asyncio.get_running_loop(), asyncio.Event()
        await serve(
            source,
            ledger.totals,
            config or ServeConfig(port=0, grace_s=1),
            on_ready=lambda url: ready.put((url, loop, stop)),
            stop=stop,
        )

    def run() -> None:
        try:
            asyncio.run(work())
        except BaseException as error:
            ready.put(error)

    thread = threading.Thread(target=run, name="device")
    thread.start()
    started = ready.get(timeout=30)
    if isinstance(started, BaseException):
        raise started
    url, loop, stop = started
    try:
        yield Service(url, source, ledger)
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join(timeout=30)
        assert not thread.is_alive()

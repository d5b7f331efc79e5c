"""The device's way to its cloud: greet, fetch the public parts, collect features, generate, and come back.

A connection may break at any time. A generation then goes on over a new one, from what the device holds.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Self, TypeVar

import numpy as np
from numpy.typing import NDArray

from cotune.device.beam_stream import BeamDeviceStream
from cotune.device.stream import DeviceStream
from cotune.errors import ConnectionLostError, FrameError, InputError, RefusedError
from cotune.generation.request import Decision
from cotune.wire.description import CloudDescription
from cotune.wire.feature_frames import FeatureShape, unpack_features
from cotune.wire.features import SequenceFeatures
from cotune.wire.frames import (
    PROTOCOL_VERSION,
    Asset,
    AssetKind,
    AssetRequest,
    Error,
    Features,
    FeaturesRequest,
    Frame,
    Hello,
    Welcome,
    decode,
    encode,
)
from cotune.wire.transport import Connection

MAX_ASSET_BYTES = 256 * 1024 * 1024
_MAX_DOUBLINGS = 60

F = TypeVar("F", bound=Frame)
Connector = Callable[[], Awaitable[Connection]]


@dataclass(frozen=True, kw_only=True)
class ClientConfig:
    """Patience of a device.

    Attributes:
        timeout_s: how long to wait for any one answer, seconds.
        max_attempts: how often in a row to connect anew after a broken connection before giving up.
        first_backoff_s, max_backoff_s: wait before the second attempt, and the longest one; it doubles between.
        busy_patience_s: for how long to come back to a cloud that is full, seconds; 0 gives up at once.
    """

    timeout_s: float = 30.0
    max_attempts: int = 8
    first_backoff_s: float = 0.05
    max_backoff_s: float = 5.0
    busy_patience_s: float = 60.0

    def __post_init__(self) -> None:
        for name in ("timeout_s", "max_attempts", "first_backoff_s", "max_backoff_s"):
            if getattr(self, name) <= 0:
                raise InputError(f"{name} is {getattr(self, name)}, expected a number above 0")
        if self.busy_patience_s < 0:
            raise InputError(f"busy_patience_s is {self.busy_patience_s}, expected 0 or more")


class CloudClient:
    """One device's conversation with a cloud, over as many connections as it takes.

    Args:
        connector: makes a new connection.
        config: patience.

    Attributes:
        bytes_sent, bytes_received: of frames, over all connections.
        num_reconnects: connections that were made anew.
        heard_s: when the last frame came, on the clock of `time.monotonic`; 0 before any did.

    Example:
        >>> async with CloudClient(lambda: connect("ws://127.0.0.1:7070")) as client:   # doctest: +SKIP
        ...     await client.generate(stream)
    """

    def __init__(self, connector: Connector, config: ClientConfig | None = None) -> None:
        self.config = config or ClientConfig()
        self.bytes_sent = 0
        self.bytes_received = 0
        self.num_reconnects = 0
        self.heard_s = 0.0
        self._num_opened = 0
        self._connector = connector
        self._connection: Connection | None = None
        self._description: CloudDescription | None = None

    async def __aenter__(self) -> Self:
        await self.connect()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    @property
    def description(self) -> CloudDescription:
        """What the cloud said about its model; known once connected."""
        if self._description is None:
            raise InputError("the client is not connected yet; use it as `async with CloudClient(...)`")
        return self._description

    async def connect(self) -> CloudDescription:
        """Make sure that a connection stands; says what the cloud hosts.

        Raises:
            WireError: the cloud is not there, refuses, or is none.
            MismatchError: it hosts something else than before.
        """
        await self._connected()
        return self.description

    def let_go(self) -> Connection | None:
        """Hand out the connection, if there is one, to be closed by somebody who has the time; the next one is new."""
        connection, self._connection = self._connection, None
        return connection

    async def close(self) -> None:
        """Close the connection, if there is one."""
        connection = self.let_go()
        if connection is not None:
            await connection.close()

    async def fetch(self, kind: AssetKind) -> bytes:
        """A public part of the hosted model: its tokenizer, or its output basis.

        Raises:
            FrameError: larger than `MAX_ASSET_BYTES`, or pieces that do not fit together.
        """
        data = b""
        while True:
            await self._send(AssetRequest(kind=kind, pos=len(data)))
            piece = await self._expect(Asset)
            if piece.total_bytes > MAX_ASSET_BYTES:
                raise FrameError(f"asset of {piece.total_bytes} bytes announced, expected at most {MAX_ASSET_BYTES}")
            if piece.pos != len(data) or (not piece.chunk and len(data) < piece.total_bytes):
                raise FrameError(f"asset bytes from {piece.pos} came, expected bytes from {len(data)} on")
            data += piece.chunk
            if len(data) >= piece.total_bytes:
                return data

    async def features(
        self, input_ids: NDArray[np.int64], first_target: int, top_k: int, *, want_hidden: bool = True
    ) -> SequenceFeatures:
        """Teacher-forced features of one sequence; see `cotune.wire.features.FeatureSource`.

        Args:
            input_ids, first_target, top_k: as there.
            want_hidden: whether the final hidden states shall come too; without them `hidden` is (targets, 0).
        """
        request = FeaturesRequest(input_ids=input_ids, pos=first_target, top_k=top_k, want_hidden=want_hidden)
        await self._send(request)
        num_targets = len(input_ids) - first_target
        chunks: list[Features] = []
        while sum(chunk.num_targets for chunk in chunks) < num_targets:
            chunk = await self._expect(Features)
            if chunk.num_targets == 0:
                raise FrameError("a features frame without targets came, expected at least one")
            chunks.append(chunk)
        description = self.description
        shape = FeatureShape(
            num_taps=description.num_taps,
            tap_dim=description.tap_dim,
            top_k=min(top_k, description.vocab_size),
            hidden_dim=description.hidden_size if want_hidden else 0,
        )
        return unpack_features(chunks, shape, first_target=first_target, num_targets=num_targets)

    async def generate(
        self, stream: DeviceStream | BeamDeviceStream, on_decision: Callable[[Decision], None] | None = None
    ) -> None:
        """Run `stream` to its end, over new connections where one breaks.

        Args:
            stream: what to generate; afterwards it holds the decisions.
            on_decision: called with each decided token.

        Raises:
            RefusedError: the cloud said no.
            ConnectionLostError: no connection for `max_attempts` times in a row.
            WireTimeoutError: the cloud was silent for too long.
        """
        failures = 0
        busy_until_s = time.monotonic() + self.config.busy_patience_s
        while not stream.is_done:
            before = stream.num_decided
            try:
                await self._run(stream, on_decision)
            except RefusedError as error:
                # A cloud that says when to come back is only full. Devices come back spread over time.
                wait_s = (error.retry_after_s or 0.0) * random.uniform(1.0, 2.0)
                if error.retry_after_s is None or time.monotonic() + wait_s > busy_until_s:
                    raise
                await self.close()
                await asyncio.sleep(wait_s)
            except ConnectionLostError:
                failures = 1 if stream.num_decided > before else failures + 1
                await self.close()
                if failures >= self.config.max_attempts:
                    raise
                self.num_reconnects += 1
                await asyncio.sleep(self._backoff_s(failures))

    async def _run(
        self, stream: DeviceStream | BeamDeviceStream, on_decision: Callable[[Decision], None] | None
    ) -> None:
        self._num_opened += 1
        await self._send(replace(stream.open_frame(), epoch=self._num_opened & 0xFFFF))
        deadline_s = time.monotonic() + self.config.timeout_s
        while not stream.is_done:
            frame = await self._receive(max(0.001, deadline_s - time.monotonic()))
            known, corrected = len(stream.decisions), stream.num_corrections
            decided = stream.num_decided
            replies = stream.on_frame(frame)
            try:
                for reply in replies:
                    await self._send(reply)
            finally:
                # Also where the answer met a broken connection: what is decided stays decided.
                if on_decision is not None:
                    for decision in stream.decisions[known:]:
                        on_decision(decision)
            # Only progress buys more time: a cloud that repeats itself for ever is as silent as one that is gone.
            if stream.num_decided > decided or stream.num_corrections > corrected:
                deadline_s = time.monotonic() + self.config.timeout_s

    def _backoff_s(self, failures: int) -> float:
        # Beyond some dozen doublings any wait is the longest, and beyond a thousand a float overflows.
        longest = min(self.config.max_backoff_s, self.config.first_backoff_s * 2.0 ** min(failures - 1, _MAX_DOUBLINGS))
        # Devices that lost the same cloud come back spread over time. The draw decides no token.
        return longest * random.uniform(0.5, 1.0)

    async def _connected(self) -> Connection:
        if self._connection is None:
            connection = await self._connector()
            try:
                await connection.send(encode(Hello()))
                frame = decode(await connection.receive(self.config.timeout_s))
                description = _welcomed(frame)
                if self._description is not None:
                    self.description.check_same(description)
            except BaseException:
                await connection.close()
                raise
            self._connection, self._description = connection, description
        return self._connection

    async def _send(self, frame: Frame) -> None:
        connection = await self._connected()
        data = encode(frame)
        await connection.send(data)
        self.bytes_sent += len(data)

    async def _receive(self, timeout_s: float) -> Frame:
        connection = await self._connected()
        data = await connection.receive(timeout_s)
        self.bytes_received += len(data)
        self.heard_s = time.monotonic()
        frame = decode(data)
        if isinstance(frame, Error):
            raise _refusal(frame)
        return frame

    async def _expect(self, kind: type[F]) -> F:
        while True:
            frame = await self._receive(self.config.timeout_s)
            if isinstance(frame, kind):
                return frame


def _welcomed(frame: Frame) -> CloudDescription:
    if isinstance(frame, Error):
        raise _refusal(frame)
    if not isinstance(frame, Welcome):
        raise FrameError(f"the cloud's first frame is a {type(frame).__name__}, expected a Welcome")
    if frame.version != PROTOCOL_VERSION:
        raise FrameError(
            f"the cloud speaks protocol {frame.version}, expected {PROTOCOL_VERSION}; "
            "install the same cotune version on both sides"
        )
    return CloudDescription.from_info(frame.info)


def _refusal(frame: Error) -> RefusedError:
    retry_after_s = frame.pos / 1e3 if frame.pos else None
    return RefusedError(frame.code, f"the cloud refused: {frame.message}", retry_after_s=retry_after_s)

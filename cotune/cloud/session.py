"""One device's generation on the cloud: the stream, its cache, its ticket and the task that drives them."""

from __future__ import annotations

import asyncio
import hmac
import logging
import secrets
import time
from collections.abc import Callable
from functools import partial

from cotune.cloud.engine import Engine
from cotune.cloud.stream import CloudStream
from cotune.errors import CotuneError, WireError
from cotune.generation.protocols import Cursor
from cotune.wire.frames import TICKET_BYTES, EndReason, Frame, encode
from cotune.wire.transport import Connection

logger = logging.getLogger("cotune.cloud")


class Session:
    """A stream that outlives its connection for a while, so that a device can come back to it.

    Args:
        stream: the generation.
        engine: does its forward passes.
        idle_timeout_s: end the session when the device has not answered for this long.
    """

    def __init__(self, stream: CloudStream, engine: Engine, *, idle_timeout_s: float) -> None:
        self.stream = stream
        self.ticket = secrets.token_bytes(TICKET_BYTES)
        self.expiry: asyncio.TimerHandle | None = None
        self._engine = engine
        self._cursor: Cursor | None = None
        self._idle_timeout_s = idle_timeout_s
        self._connection: Connection | None = None
        self._sending = asyncio.Lock()
        self._task: asyncio.Task[None] | None = None
        self._news = asyncio.Event()

    def admits(self, ticket: bytes) -> bool:
        """Whether `ticket` is the one handed out for this session."""
        return hmac.compare_digest(ticket, self.ticket)

    def attach(self, connection: Connection, on_over: Callable[[Session, CotuneError | None], None]) -> None:
        """Run on this connection, and on no other.

        Args:
            connection: the device's.
            on_over: told when the text is complete (None), or why it cannot be.
        """
        self.detach()
        if self.expiry is not None:
            self.expiry.cancel()
        self._connection = connection
        self._sending = asyncio.Lock()
        self._task = asyncio.create_task(self._run(on_over))

    def detach(self) -> None:
        """Stop running; the stream and its cache stay as they are."""
        if self._task is not None and self._task is not asyncio.current_task():
            self._task.cancel()
        self._connection = None
        self._task = None

    def is_on(self, connection: Connection) -> bool:
        return self._connection is connection

    async def deliver(self, frame: Frame) -> None:
        """Hand one frame of the device to the stream, and send what it answers."""
        replies = self.stream.on_frame(frame, time.monotonic())
        self._news.set()
        await self.send(replies)

    async def send(self, frames: list[Frame]) -> None:
        """Send in the order of the calls; without a connection the frames are dropped."""
        connection = self._connection
        if not frames or connection is None:
            return
        async with self._sending:
            for frame in frames:
                await connection.send(encode(frame))

    async def _run(self, on_over: Callable[[Session, CotuneError | None], None]) -> None:
        try:
            await self._generate()
        except WireError as error:
            # The connection's own reader notices too; the device may come back with its ticket.
            logger.info("session %d paused: %s", self.stream.session, error)
        except CotuneError as error:
            on_over(self, error)
        except Exception:
            logger.exception("session %d failed", self.stream.session)
            on_over(self, CotuneError("the cloud failed in this session; its log says why, try again"))
        else:
            self._cursor = None
            on_over(self, None)

    async def _generate(self) -> None:
        stream = self.stream
        while stream.ended is None:
            if stream.wants_step():
                if self._cursor is None:
                    self._cursor = self._engine.model.backbone.cursor()
                    stream.forget_cache()
                plan = stream.plan()
                features, seconds = await self._engine.step(self._cursor, plan, partial(stream.is_current, plan))
                await self.send(stream.on_step(plan, features, seconds, time.monotonic()))
                continue
            stream.note_stall(time.monotonic())
            self._news.clear()
            try:
                async with asyncio.timeout(self._idle_timeout_s):
                    await self._news.wait()
            except TimeoutError:
                await self.send(stream.end(EndReason.CANCELLED, time.monotonic()))

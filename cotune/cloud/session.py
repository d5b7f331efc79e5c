"""One device's generation on the cloud: the stream, its place in the engine, its ticket, and who is listening."""

from __future__ import annotations

import asyncio
import hmac
import secrets
import time
from collections.abc import Callable, Sequence
from typing import Any

from cotune.cloud.beam_stream import BeamStream
from cotune.cloud.branches import BranchingStream
from cotune.cloud.engine import Engine
from cotune.cloud.row import Place
from cotune.cloud.stream import CloudStream
from cotune.errors import CotuneError
from cotune.generation.protocols import StepFeatures
from cotune.wire.frames import TICKET_BYTES, EndReason, Frame, encode
from cotune.wire.outbox import Outbox

Stream = CloudStream | BeamStream | BranchingStream


class Session:
    """A stream that outlives its connection for a while, so that a device can come back to it. Fits `Row`.

    Args:
        stream: the generation.
        engine: does its forward passes.
        owner: whose it is, for limits; a digest of the device's token, say.
    """

    def __init__(self, stream: Stream, engine: Engine, *, owner: str = "") -> None:
        self.stream = stream
        self.ticket = secrets.token_bytes(TICKET_BYTES)
        self.owner = owner
        self.expiry: asyncio.TimerHandle | None = None
        self.heard_s = time.monotonic()
        self._place = Place()
        self._engine = engine
        self._outbox: Outbox | None = None
        self._on_over: Callable[[Session, CotuneError | None], None] | None = None

    def admits(self, ticket: bytes) -> bool:
        """Whether `ticket` is the one handed out for this session."""
        return hmac.compare_digest(ticket, self.ticket)

    def attach(self, outbox: Outbox, on_over: Callable[[Session, CotuneError | None], None]) -> None:
        """Run for whoever reads `outbox`, and for nobody else.

        Args:
            outbox: of the device's connection.
            on_over: told when the text is complete (None), or why it cannot be.
        """
        self.detach()
        if self.expiry is not None:
            self.expiry.cancel()
            self.expiry = None
        self._outbox, self._on_over = outbox, on_over
        self.heard_s = time.monotonic()
        if self.stream.ended is None:
            self._engine.start(self)
        else:
            self._over(None)

    def detach(self) -> None:
        """Stop running; the stream and its cache stay as they are."""
        self._engine.stop(self)
        self._outbox = self._on_over = None

    @property
    def is_attached(self) -> bool:
        return self._outbox is not None

    def is_for(self, outbox: Outbox) -> bool:
        """Whether it runs for whoever reads `outbox`."""
        return self._outbox is outbox

    def deliver(self, frame: Frame) -> None:
        """Hand one frame of the device to the stream, and send what it answers."""
        self.heard_s = time.monotonic()
        self.send(self.stream.on_frame(frame, self.heard_s))
        self._engine.wake()
        self._end_if_over()

    def end(self, reason: EndReason) -> None:
        """End the text before it is complete."""
        self.send(self.stream.end(reason, time.monotonic()))
        self._end_if_over()

    def send(self, frames: Sequence[Frame]) -> None:
        """Send in the order of the calls; without a connection the frames are dropped."""
        if self._outbox is not None:
            for frame in frames:
                self._outbox.put(encode(frame))

    # What the engine asks and tells.

    @property
    def steps(self) -> Stream:
        return self.stream

    @property
    def place(self) -> Place:
        return self._place

    @property
    def is_blocked(self) -> bool:
        return self._outbox is None or self._outbox.is_full

    @property
    def due_s(self) -> float | None:
        return self.stream.due_s

    def on_step(
        self, plan: Any, features: Sequence[StepFeatures] | None, seconds: float, now_s: float, share: float
    ) -> None:
        self.send(self.stream.on_step(plan, features, seconds, now_s, share=share))
        self._end_if_over()

    def on_time(self, now_s: float) -> None:
        self.send(self.stream.on_time(now_s))
        self._end_if_over()

    def on_idle(self, now_s: float) -> None:
        self.stream.note_stall(now_s)

    def on_failure(self, error: CotuneError) -> None:
        self._over(error)

    def _end_if_over(self) -> None:
        if self.stream.ended is not None:
            self._over(None)

    def _over(self, error: CotuneError | None) -> None:
        on_over, self._on_over = self._on_over, None
        if on_over is not None:
            # Nothing more is computed: what the text needed of the cache is free for others.
            self._engine.put_out(self)
            on_over(self, error)

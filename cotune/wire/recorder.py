"""A connection that keeps every frame that went through it, in order: for tests and audits."""

from __future__ import annotations

from typing import NamedTuple

from cotune.wire.transport import Connection, ConnectionWrapper, check_size


class RecordedFrame(NamedTuple):
    """One frame that passed."""

    outgoing: bool
    data: bytes


class RecordingConnection(ConnectionWrapper):
    """Does what `connection` does, and keeps all its frames in memory."""

    def __init__(self, connection: Connection) -> None:
        super().__init__(connection)
        self.frames: list[RecordedFrame] = []

    @property
    def sent(self) -> list[bytes]:
        """All frames sent, oldest first."""
        return [frame.data for frame in self.frames if frame.outgoing]

    @property
    def received(self) -> list[bytes]:
        """All frames received, oldest first."""
        return [frame.data for frame in self.frames if not frame.outgoing]

    async def send(self, data: bytes) -> None:
        check_size(data)
        if not self.closed:  # before it leaves, so that an answer cannot stand before its question
            self.frames.append(RecordedFrame(True, bytes(data)))
        await super().send(data)

    async def receive(self, timeout_s: float) -> bytes:
        data = await super().receive(timeout_s)
        self.frames.append(RecordedFrame(False, data))
        return data

"""A connection whose every outgoing frame is written into the egress ledger before it leaves."""

from __future__ import annotations

from cotune.ledger import EgressLedger
from cotune.wire.frames import kind_of
from cotune.wire.transport import Connection, ConnectionWrapper, check_size


class LedgeredConnection(ConnectionWrapper):
    """Does what `connection` does, and records what it sends.

    Args:
        connection: usually the device's, outside of any emulator, so that only real frames are counted.
        ledger: where to write; stays open when the connection closes.
        way: the way of working, the `way` of each entry.
    """

    def __init__(self, connection: Connection, ledger: EgressLedger, way: str) -> None:
        super().__init__(connection)
        self._ledger = ledger
        self._way = way

    async def send(self, data: bytes) -> None:
        check_size(data)
        if not self.closed:  # before it leaves: a send that breaks half-way has left
            self._ledger.record(self._way, kind_of(data), data)
        await super().send(data)

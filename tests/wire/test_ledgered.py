"""Every frame that leaves stands in the ledger, under the name of its type."""

from __future__ import annotations

from pathlib import Path

import pytest

from cotune.errors import ConnectionLostError
from cotune.ledger import EgressLedger
from cotune.wire.frames import Ack, Hello, encode
from cotune.wire.inprocess import connection_pair
from cotune.wire.ledgered import LedgeredConnection


async def test_sent_frames_are_recorded_by_type(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    a, b = connection_pair()
    with EgressLedger(path) as ledger:
        ledgered = LedgeredConnection(a, ledger, "generate")
        await ledgered.send(encode(Hello()))
        await ledgered.send(encode(Ack(pos=1)))
        await ledgered.send(b"\xffnonsense")
        await b.send(encode(Ack()))
        await ledgered.receive(1)
        await b.close()
        with pytest.raises(ConnectionLostError):
            await ledgered.send(encode(Ack(pos=2)))
        assert ledger.totals() == {
            "hello": {"count": 1, "bytes": 18},
            "ack": {"count": 1, "bytes": 16},
            "unknown": {"count": 1, "bytes": 9},
        }
    assert [(entry.way, entry.kind) for entry in EgressLedger.read(path)] == [
        ("generate", "hello"),
        ("generate", "ack"),
        ("generate", "unknown"),
    ]

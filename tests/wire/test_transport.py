"""Wrappers do what they wrap, and importing the wire needs no torch."""

from __future__ import annotations

import subprocess
import sys

import pytest

from cotune.errors import ConnectionLostError
from cotune.wire.inprocess import connection_pair
from cotune.wire.transport import ConnectionWrapper


async def test_a_wrapper_passes_everything_through() -> None:
    a, b = connection_pair()
    wrapped = ConnectionWrapper(a)
    await wrapped.send(b"abc")
    await b.send(b"de")
    assert await wrapped.receive(1) == b"de"
    assert (wrapped.frames_sent, wrapped.bytes_sent) == (1, 3)
    assert (wrapped.frames_received, wrapped.bytes_received) == (1, 2)
    assert not wrapped.closed
    await wrapped.close()
    assert wrapped.closed and a.closed
    with pytest.raises(ConnectionLostError):
        await wrapped.send(b"x")


def test_importing_the_wire_does_not_import_torch() -> None:
    code = """
import importlib, pkgutil, sys
import cotune.ledger, cotune.wire
for module in pkgutil.iter_modules(cotune.wire.__path__):
    importlib.import_module(f"cotune.wire.{module.name}")
assert "cotune.wire.websocket" in sys.modules
assert not {"torch", "transformers"} & sys.modules.keys()
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)

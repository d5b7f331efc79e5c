"""The recorder keeps what passed, in order, and nothing else."""

from __future__ import annotations

import pytest

from cotune.errors import ConnectionLostError, FrameError
from cotune.wire.frames import MAX_FRAME_BYTES
from cotune.wire.inprocess import connection_pair
from cotune.wire.recorder import RecordedFrame, RecordingConnection


async def test_frames_are_kept_in_order() -> None:
    a, b = connection_pair()
    recording = RecordingConnection(a)
    await recording.send(b"one")
    await b.send(b"two")
    await recording.receive(1)
    await recording.send(b"three")
    assert recording.frames == [(True, b"one"), (False, b"two"), RecordedFrame(outgoing=True, data=b"three")]
    assert recording.sent == [b"one", b"three"]
    assert recording.received == [b"two"]


async def test_what_did_not_leave_is_not_kept() -> None:
    a, b = connection_pair()
    recording = RecordingConnection(a)
    with pytest.raises(FrameError):
        await recording.send(bytes(MAX_FRAME_BYTES + 1))
    await b.close()
    with pytest.raises(ConnectionLostError):
        await recording.send(b"x")
    assert recording.frames == []

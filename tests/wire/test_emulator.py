"""The emulated network: delay, order, bandwidth, doubles, cuts, and nothing left behind.

Times are checked from below exactly and from above loosely: a busy machine may be late, never early.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator

import pytest

from cotune.errors import ConnectionLostError, FrameError, InputError, WireTimeoutError
from cotune.wire.emulator import MAX_BYTES_IN_FLIGHT, PROFILES, EmulatedConnection, NetworkProfile
from cotune.wire.frames import MAX_FRAME_BYTES
from cotune.wire.inprocess import connection_pair
from cotune.wire.transport import Connection

LATE_S = 5.0


@pytest.fixture(autouse=True)
async def no_task_stays_behind() -> AsyncIterator[None]:
    before = asyncio.all_tasks()
    yield
    assert not asyncio.all_tasks() - before - {asyncio.current_task()}


def emulated(seed: int = 0, **profile: object) -> tuple[EmulatedConnection, Connection]:
    near, far = connection_pair()
    return EmulatedConnection(near, NetworkProfile(**profile), seed), far  # type: ignore[arg-type]


async def test_a_round_trip_takes_twice_the_delay() -> None:
    network, far = emulated(delay_ms=20)
    started = time.perf_counter()
    await network.send(b"there")
    assert await far.receive(LATE_S) == b"there"
    there = time.perf_counter()
    assert there - started >= 0.02
    await far.send(b"back")
    assert await network.receive(LATE_S) == b"back"
    assert time.perf_counter() - started >= 0.04
    await network.close()


async def test_the_typical_delay_is_close() -> None:
    """The best of many tries: one that the machine did not disturb."""
    network, far = emulated(delay_ms=3)
    times = []
    for _ in range(50):
        started = time.perf_counter()
        await network.send(b"x")
        await far.receive(LATE_S)
        times.append(time.perf_counter() - started)
    assert 0.003 <= min(times) < 0.006
    await network.close()


async def test_many_frames_fly_at_once() -> None:
    """A sender does not wait for the network: fifty frames one after the other would take 5 s."""
    network, far = emulated(delay_ms=100)
    started = time.perf_counter()
    for number in range(50):
        await network.send(bytes([number]))
    assert [await far.receive(LATE_S) for _ in range(50)] == [bytes([number]) for number in range(50)]
    assert 0.1 <= time.perf_counter() - started < 4.0
    await network.close()


async def test_jitter_never_reorders() -> None:
    network, far = emulated(delay_ms=5, jitter_ms=5)
    for number in range(100):
        await network.send(bytes([number]))
        await far.send(bytes([number]))
    for side in (far, network):
        assert [await side.receive(LATE_S) for _ in range(100)] == [bytes([number]) for number in range(100)]
    await network.close()


async def test_bandwidth_is_shared_by_the_frames_of_one_direction() -> None:
    """4 * 12,500 bytes are 400,000 bits: 40 ms at 10 Mbit/s, one after the other; the other way is free."""
    network, far = emulated(bandwidth_mbps=10)
    started = time.perf_counter()
    for _ in range(4):
        await network.send(bytes(12_500))
    arrivals = []
    for _ in range(4):
        await far.receive(LATE_S)
        arrivals.append(time.perf_counter() - started)
    assert all(arrival >= 0.01 * (number + 1) for number, arrival in enumerate(arrivals))
    await network.close()


async def test_doubled_frames_come_twice_in_a_row() -> None:
    network, far = emulated(duplicate_probability=1.0)
    for data in (b"a", b"b"):
        await network.send(data)
    assert [await far.receive(LATE_S) for _ in range(4)] == [b"a", b"a", b"b", b"b"]
    await far.send(b"c")
    assert [await network.receive(LATE_S) for _ in range(2)] == [b"c", b"c"]
    assert (network.frames_sent, network.frames_received) == (2, 2)
    await network.close()


async def test_doubles_follow_from_the_seed() -> None:
    async def pattern(seed: int) -> list[bytes]:
        network, far = emulated(seed, duplicate_probability=0.5)
        for number in range(30):
            await network.send(bytes([number]))
        await network.close()
        frames = []
        while True:
            try:
                frames.append(await far.receive(0))
            except ConnectionLostError:
                return frames

    assert await pattern(1) == await pattern(1) != await pattern(2)


async def test_a_cut_after_so_many_frames_loses_what_is_in_flight() -> None:
    network, far = emulated(delay_ms=5, disconnect_every_frames=3)
    await network.send(b"one")
    assert await far.receive(LATE_S) == b"one"
    await far.send(b"two")
    assert await network.receive(LATE_S) == b"two"
    waiting = asyncio.create_task(network.receive(LATE_S))
    await asyncio.sleep(0)
    await network.send(b"three, lost")
    assert network.closed
    for broken in (waiting, network.send(b"x"), network.receive(1), far.receive(1), far.send(b"x")):
        with pytest.raises(ConnectionLostError, match="open a new one"):
            await broken
    await network.close()


async def test_a_cut_loses_what_a_receiver_waits_for() -> None:
    network, far = emulated(delay_ms=20, disconnect_every_frames=1)
    await far.send(b"in flight")
    receiver = asyncio.create_task(network.receive(LATE_S))
    await asyncio.sleep(0.001)
    await network.send(b"cut")
    with pytest.raises(ConnectionLostError):
        await receiver
    await network.close()


async def test_closing_does_not_linger_for_frames_that_cannot_arrive() -> None:
    network, far = emulated(delay_ms=5)
    await network.send(b"x")
    await far.close()
    async with asyncio.timeout(2):
        await network.close()


async def test_a_cut_that_nobody_closes_leaves_no_task() -> None:
    network, far = emulated(disconnect_every_frames=1)
    await network.send(b"x")
    with pytest.raises(ConnectionLostError):
        await far.receive(LATE_S)
    assert network.closed
    await asyncio.sleep(0.01)


async def test_closing_delivers_what_is_on_its_way_out() -> None:
    network, far = emulated(delay_ms=10)
    await network.send(b"last")
    await network.close()
    await network.close()
    assert network.closed and far.closed
    assert await far.receive(1) == b"last"
    with pytest.raises(ConnectionLostError):
        await network.send(b"x")


async def test_the_other_side_closing_is_seen_after_its_last_frame() -> None:
    network, far = emulated(delay_ms=10)
    await far.send(b"last")
    await far.close()
    assert await network.receive(LATE_S) == b"last"
    with pytest.raises(ConnectionLostError):
        await network.receive(LATE_S)
    assert network.closed
    await asyncio.sleep(0.01)  # even if nobody closes, no task stays behind


async def test_a_timeout_leaves_the_connection_usable() -> None:
    network, far = emulated(delay_ms=200)
    await far.send(b"x")
    with pytest.raises(WireTimeoutError, match=r"within 0\.001 s"):
        await network.receive(0.001)
    assert await network.receive(LATE_S) == b"x"
    await network.close()


async def test_cancelling_a_receiver_loses_nothing() -> None:
    network, far = emulated(delay_ms=5)
    await far.send(b"x")
    receiver = asyncio.create_task(network.receive(LATE_S))
    await asyncio.sleep(0)
    receiver.cancel()
    with pytest.raises(asyncio.CancelledError):
        await receiver
    assert await network.receive(LATE_S) == b"x"
    await network.close()


async def test_a_full_network_makes_senders_wait() -> None:
    network, far = emulated(delay_ms=30)
    started = time.perf_counter()
    for _ in range(MAX_BYTES_IN_FLIGHT // MAX_FRAME_BYTES):
        await network.send(bytes(MAX_FRAME_BYTES))
    await network.send(b"waits for the first one to arrive")
    assert time.perf_counter() - started >= 0.03
    assert len(await far.receive(LATE_S)) == MAX_FRAME_BYTES
    await network.close()
    with pytest.raises(FrameError):
        await network.send(bytes(MAX_FRAME_BYTES + 1))


async def test_networks_can_be_put_in_a_row() -> None:
    near, far = connection_pair()
    network = EmulatedConnection(EmulatedConnection(near, NetworkProfile(delay_ms=5)), NetworkProfile(delay_ms=5))
    started = time.perf_counter()
    await network.send(b"x")
    assert await far.receive(LATE_S) == b"x"
    assert time.perf_counter() - started >= 0.01
    await network.close()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"delay_ms": -1}, "delay_ms is -1"),
        ({"delay_ms": float("nan")}, "delay_ms is nan"),
        ({"delay_ms": float("inf")}, "delay_ms is inf"),
        ({"delay_ms": 1, "jitter_ms": 2}, "expected 0 to delay_ms = 1"),
        ({"bandwidth_mbps": 0}, "bandwidth_mbps is 0"),
        ({"disconnect_every_frames": 0}, "disconnect_every_frames is 0"),
        ({"duplicate_probability": 1.5}, "duplicate_probability is 1.5"),
    ],
)
def test_bad_profiles_are_refused(fields: dict[str, float], message: str) -> None:
    with pytest.raises(InputError, match=message):
        NetworkProfile(**fields)  # type: ignore[arg-type]


def test_named_profiles() -> None:
    assert PROFILES["loopback"] == NetworkProfile()
    assert PROFILES["wan"].delay_ms == NetworkProfile.of_rtt(50).delay_ms == 25

"""A slow, narrow or breaking network in front of any connection.

Both directions behave like TCP over a real network: frames are delayed but stay in order, many are in flight at once,
bandwidth is shared by the frames of one direction, and a cut loses what is in flight. Frames may also be doubled, as a
resumed session does. The loop's timers tick in milliseconds, so the last one is waited out by yielding: a frame
arrives a few tens of microseconds after its time where the loop is free.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import random
from collections import deque
from dataclasses import dataclass

from cotune.errors import ConnectionLostError, InputError, WireError, WireTimeoutError
from cotune.wire.transport import Connection, Traffic, check_size

MAX_BYTES_IN_FLIGHT = 8 * 1024 * 1024
"""In each direction; more makes the sender wait, as a full TCP window does."""

_TICK_S = 0.001
_POLL_S = 60.0
_LINGER_S = 5.0


@dataclass(frozen=True, kw_only=True)
class NetworkProfile:
    """How a network behaves; the round trip takes 2 * delay_ms."""

    delay_ms: float = 0.0
    """One way, milliseconds."""
    jitter_ms: float = 0.0
    """Each frame's delay is delay_ms plus or minus up to this, uniformly; frames never overtake each other."""
    bandwidth_mbps: float | None = None
    """Megabits per second in each direction, None for no limit."""
    disconnect_every_frames: int | None = None
    """The connection is cut after this many frames in both directions together, None for never."""
    duplicate_probability: float = 0.0
    """Share of frames that arrive twice, 0 to 1."""

    def __post_init__(self) -> None:
        if not 0 <= self.delay_ms < math.inf:
            raise InputError(f"delay_ms is {self.delay_ms}, expected a number from 0 on")
        if not 0 <= self.jitter_ms <= self.delay_ms:
            raise InputError(f"jitter_ms is {self.jitter_ms}, expected 0 to delay_ms = {self.delay_ms}")
        if self.bandwidth_mbps is not None and not 0 < self.bandwidth_mbps < math.inf:
            raise InputError(f"bandwidth_mbps is {self.bandwidth_mbps}, expected a number above 0 or None")
        if self.disconnect_every_frames is not None and self.disconnect_every_frames < 1:
            raise InputError(f"disconnect_every_frames is {self.disconnect_every_frames}, expected at least 1 or None")
        if not 0 <= self.duplicate_probability <= 1:
            raise InputError(f"duplicate_probability is {self.duplicate_probability}, expected 0 to 1")

    @classmethod
    def of_rtt(cls, rtt_ms: float) -> NetworkProfile:
        """A steady network with this round-trip time in milliseconds."""
        return cls(delay_ms=rtt_ms / 2)


PROFILES: dict[str, NetworkProfile] = {
    "loopback": NetworkProfile(),
    "lan": NetworkProfile(delay_ms=0.25, jitter_ms=0.05, bandwidth_mbps=1000),
    "wifi": NetworkProfile(delay_ms=2, jitter_ms=1, bandwidth_mbps=100),
    "wan": NetworkProfile(delay_ms=25, jitter_ms=2, bandwidth_mbps=100),
    "mobile": NetworkProfile(delay_ms=35, jitter_ms=15, bandwidth_mbps=20),
    "far": NetworkProfile(delay_ms=100, jitter_ms=5, bandwidth_mbps=50),
}


class EmulatedConnection(Traffic):
    """`connection` behind a network like `profile`; see `cotune.wire.transport.Connection`.

    The counters count what is sent into and received from this network. Close it as any other connection: frames on
    their way out are still delivered, and no task stays behind.

    Args:
        connection: one end; it belongs to this object from now on.
        profile: how the network behaves.
        seed: jitter and doubled frames of both directions follow from it.
    """

    def __init__(self, connection: Connection, profile: NetworkProfile, seed: int = 0) -> None:
        super().__init__()
        self._connection = connection
        self._profile = profile
        self._outgoing = _Way(profile, f"{seed} out")
        self._incoming = _Way(profile, f"{seed} in")
        self._closing = False
        self._broken = asyncio.Event()
        self._supervisor = asyncio.get_running_loop().create_task(self._supervise())

    @property
    def closed(self) -> bool:
        return self._closing or self._broken.is_set() or self._connection.closed

    async def send(self, data: bytes) -> None:
        check_size(data)
        await self._outgoing.wait_for_room()
        if self.closed:
            raise _lost()
        self._outgoing.put(bytes(data))
        self.sent(data)
        self._count()
        await asyncio.sleep(0)  # so that a sender in a loop lets its receiver run

    async def receive(self, timeout_s: float) -> bytes:
        try:
            async with asyncio.timeout(timeout_s):
                item = await self._incoming.first()
        except TimeoutError:
            raise WireTimeoutError(f"nothing came within {timeout_s:g} s") from None
        self._incoming.drop_first()
        if isinstance(item, WireError):
            self._break()
            raise item
        self.received(item)
        self._count()
        return item

    async def close(self) -> None:
        self._closing = True
        with contextlib.suppress(TimeoutError, ConnectionLostError):
            async with asyncio.timeout(_LINGER_S):
                await self._outgoing.wait_until_empty()
        self._break()
        await asyncio.wait({self._supervisor})

    def _count(self) -> None:
        limit = self._profile.disconnect_every_frames
        if limit is not None and self.frames_sent + self.frames_received >= limit:
            self._break()

    def _break(self) -> None:
        self._outgoing.fail()
        self._incoming.fail()
        self._broken.set()

    async def _supervise(self) -> None:
        pumps = [asyncio.create_task(self._carry_out()), asyncio.create_task(self._take_in())]
        try:
            await self._broken.wait()
        finally:
            for pump in pumps:
                pump.cancel()
            await asyncio.wait(pumps)
            await self._connection.close()

    async def _carry_out(self) -> None:
        try:
            while True:
                item = await self._outgoing.first()
                assert isinstance(item, bytes)
                await self._connection.send(item)
                self._outgoing.drop_first()
        except ConnectionLostError:
            self._outgoing.fail()  # what is still coming in may be received

    async def _take_in(self) -> None:
        while True:
            try:
                await self._incoming.wait_for_room()
                self._incoming.put(await self._connection.receive(_POLL_S))
            except WireTimeoutError:
                continue
            except WireError as error:
                return self._incoming.put(error)


class _Way:
    """One direction: what is in flight, and when it arrives."""

    def __init__(self, profile: NetworkProfile, seed: str) -> None:
        self._profile = profile
        self._rng = random.Random(seed)
        self._free_at = 0.0
        self._flying: deque[tuple[float, bytes | WireError]] = deque()
        self._num_bytes = 0
        self._failed = False
        self._changed = asyncio.Event()

    def put(self, item: bytes | WireError) -> None:
        """A frame, or the error that ends this way, starts now."""
        num_bytes = len(item) if isinstance(item, bytes) else 0
        doubled = isinstance(item, bytes) and self._rng.random() < self._profile.duplicate_probability
        for _ in range(1 + doubled):
            self._flying.append((self._due(num_bytes), item))
            self._num_bytes += num_bytes
        self._changed.set()

    async def first(self) -> bytes | WireError:
        """The next item, once it has arrived; it stays in flight until `drop_first`, and so holds up the others."""
        while not self._flying:
            await self._change()
        due, item = self._flying[0]
        await _sleep_until(due)
        self._check()
        return item

    def drop_first(self) -> None:
        """The first item is out of the network."""
        if self._flying:
            _, item = self._flying.popleft()
            self._num_bytes -= len(item) if isinstance(item, bytes) else 0
            self._changed.set()

    async def wait_for_room(self) -> None:
        """Until another frame may start."""
        while self._num_bytes >= MAX_BYTES_IN_FLIGHT:
            await self._change()

    async def wait_until_empty(self) -> None:
        """Until everything has arrived."""
        while self._flying:
            await self._change()

    def fail(self) -> None:
        """Lose what is in flight; whoever waits gets a ConnectionLostError."""
        self._flying.clear()
        self._num_bytes = 0
        self._failed = True
        self._changed.set()

    def _due(self, num_bytes: int) -> float:
        profile = self._profile
        self._free_at = max(asyncio.get_running_loop().time(), self._free_at)
        if profile.bandwidth_mbps is not None:
            self._free_at += num_bytes * 8 / (profile.bandwidth_mbps * 1e6)
        delay_ms = profile.delay_ms + self._rng.uniform(-profile.jitter_ms, profile.jitter_ms)
        return self._free_at + delay_ms / 1000

    async def _change(self) -> None:
        self._check()
        self._changed.clear()
        await self._changed.wait()
        self._check()

    def _check(self) -> None:
        if self._failed:
            raise _lost()


async def _sleep_until(due: float) -> None:
    loop = asyncio.get_running_loop()
    while (left := due - loop.time()) > 0:
        await asyncio.sleep(left - _TICK_S if left > _TICK_S else 0)


def _lost() -> ConnectionLostError:
    return ConnectionLostError("the connection is closed or was cut; open a new one to go on")

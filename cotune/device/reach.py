"""Whether a device's cloud is within reach: found out by the texts themselves, and by a probe while it is not.

A probe connects, says hello and reads the welcome; nothing of the user is in it. While the cloud is away it is tried
again and again, with longer waits between, until it answers.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from cotune.errors import CotuneError, InputError, WireTimeoutError
from cotune.wire.description import CloudDescription
from cotune.wire.transport import Connection

Greet = Callable[[], Awaitable[tuple[CloudDescription, Connection | None]]]
"""Connects and greets: what the cloud hosts, and the connection, to be closed."""

# A network whose greeting takes this long needs as many times more patience.
_PATIENCE_PER_GREETING = 3.0
_MOST_PATIENCE_S = 10.0
_CLOSE_TIMEOUT_S = 3.0


@dataclass(frozen=True, kw_only=True)
class ReachConfig:
    """How soon a cloud counts as away, and how often it is tried meanwhile.

    Attributes:
        patience_s: silence in the middle of a text after which the cloud counts as away, seconds. On a network whose
            greeting takes longer than a third of it, three greetings.
        probe_timeout_s: for one try while it is away, seconds.
        first_wait_s, max_wait_s: before the second try, and the longest wait; it doubles between.
    """

    patience_s: float = 0.8
    probe_timeout_s: float = 5.0
    first_wait_s: float = 0.2
    max_wait_s: float = 5.0

    def __post_init__(self) -> None:
        for name in ("patience_s", "probe_timeout_s", "first_wait_s", "max_wait_s"):
            if not getattr(self, name) > 0:
                raise InputError(f"{name} is {getattr(self, name)}, expected a number above 0")


class CloudReach:
    """What is known of one cloud; all texts of a device share it.

    Args:
        greet: one try, which raises a CotuneError where the cloud is not there or another than expected.
        config: patience.
        sleep, clock: wait and tell the time, seconds; others in tests.

    Attributes:
        description: what the cloud said last; None before it was ever there.
        why: in a sentence, why it is away; empty while it is not.
    """

    def __init__(
        self,
        greet: Greet,
        config: ReachConfig | None = None,
        *,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.description: CloudDescription | None = None
        self.why = ""
        self.num_outages = 0
        self._config = config or ReachConfig()
        self._greet = greet
        self._sleep, self._clock = sleep, clock
        self._back = asyncio.Event()
        self._back.set()
        self._watching: asyncio.Task[None] | None = None
        self._closing: set[asyncio.Task[None]] = set()
        self._greeting_s = 0.0
        self._wait_s = 0.0

    @property
    def is_away(self) -> bool:
        return not self._back.is_set()

    @property
    def patience_s(self) -> float:
        """Silence after which the cloud counts as away, seconds."""
        return max(self._config.patience_s, min(_MOST_PATIENCE_S, _PATIENCE_PER_GREETING * self._greeting_s))

    async def greet(self, timeout_s: float | None = None) -> CloudDescription:
        """Try it once; a cloud that was away is back where it answers.

        Raises:
            CotuneError: it does not, and why.
        """
        timeout_s = self._config.probe_timeout_s if timeout_s is None else timeout_s
        started_s = self._clock()
        try:
            async with asyncio.timeout(timeout_s):
                self.description, connection = await self._greet()
        except TimeoutError:
            raise WireTimeoutError(f"the cloud does not answer within {timeout_s:g} s; is the network there?") from None
        self._greeting_s = self._clock() - started_s
        self.close_later(connection)
        self.why = ""
        self._back.set()
        return self.description

    async def answers(self, timeout_s: float) -> bool:
        """Whether it answers within `timeout_s`."""
        try:
            await self.greet(timeout_s)
        except CotuneError:
            return False
        return True

    def note_away(self, error: CotuneError) -> None:
        """It is not there; from now on it is tried in the background."""
        self.why = str(error)
        if not self.is_away:
            self.num_outages += 1
            self._back.clear()
        if self._watching is None or self._watching.done():
            self._watching = asyncio.create_task(self._watch())

    def note_progress(self) -> None:
        """It did something for a text: the next outage is a new one."""
        self._wait_s = 0.0

    async def wait_until_back(self) -> None:
        """Until it is within reach."""
        await self._back.wait()

    def close_later(self, connection: Connection | None) -> None:
        """Close a connection in the background: over a network that is gone this takes a while."""
        if connection is not None:
            task = asyncio.create_task(_close(connection))
            self._closing.add(task)
            task.add_done_callback(self._closing.discard)

    async def close(self) -> None:
        """Try no more."""
        if self._watching is not None:
            self._watching.cancel()
            await asyncio.gather(self._watching, return_exceptions=True)
        if self._closing:
            await asyncio.wait(self._closing)

    async def _watch(self) -> None:
        while self.is_away:
            # The first try of an outage comes at once. Devices that lost the same cloud come back spread over time.
            await self._sleep(self._wait_s * random.uniform(0.5, 1.0))
            self._wait_s = min(self._config.max_wait_s, max(self._config.first_wait_s, 2 * self._wait_s))
            if self.is_away:
                try:
                    await self.greet()
                except CotuneError as error:
                    self.why = str(error)


async def _close(connection: Connection) -> None:
    with contextlib.suppress(TimeoutError, CotuneError, OSError):
        async with asyncio.timeout(_CLOSE_TIMEOUT_S):
            await connection.close()

"""How much each holder of a token may ask for."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable

from cotune.errors import InputError

# Owners remembered at once; the one asked least recently is forgotten, with a full bucket.
_MOST_OWNERS = 4096


class RateLimit:
    """A bucket for each owner: it holds so many requests, and fills steadily.

    Args:
        per_minute: requests in a minute, and at once.
        clock: seconds that only grow.

    Example:
        >>> now = [0.0]
        >>> limit = RateLimit(2, clock=lambda: now[0])
        >>> [limit.wait_s("ann") for _ in range(3)]
        [0.0, 0.0, 30.0]
    """

    def __init__(self, per_minute: int, clock: Callable[[], float] = time.monotonic) -> None:
        if per_minute < 1:
            raise InputError(f"requests per minute is {per_minute}, expected at least 1")
        self._per_minute = per_minute
        self._clock = clock
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def wait_s(self, owner: str) -> float:
        """0 where the request may go ahead, which counts it; else when to come back, seconds."""
        now_s = self._clock()
        level, since_s = self._buckets.get(owner, (float(self._per_minute), now_s))
        level = min(float(self._per_minute), level + (now_s - since_s) * self._per_minute / 60.0)
        wait_s = 0.0
        if level >= 1.0:
            level -= 1.0
        else:
            wait_s = (1.0 - level) * 60.0 / self._per_minute
        self._buckets[owner] = (level, now_s)
        self._buckets.move_to_end(owner)
        if len(self._buckets) > _MOST_OWNERS:
            self._buckets.popitem(last=False)
        return wait_s

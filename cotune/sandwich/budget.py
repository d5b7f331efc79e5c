"""A budget that is never exceeded: what a request may cost at most is set aside before it is sent.

    ticket = purse.reserve(most)     no room: BudgetError, and nothing is sent
    ...                              send, wait
    purse.settle(ticket, paid)       what it came to; the rest is free again

A request whose answer never came may have been paid for all the same: nobody settles it, and it counts in full. So
does one that a killed process had sent. The journal on disk is written before each request and read when a run
goes on, so that a budget holds over all runs that share it.
"""

from __future__ import annotations

import json
import math
import os
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO, Self

from cotune.durable import whole_lines
from cotune.errors import BudgetError, DataError, InputError
from cotune.sandwich.cost import Cost

MAX_JOURNAL_BYTES = 1 << 30


@dataclass(frozen=True, kw_only=True)
class Budget:
    """The most that a run may take. None: no limit.

    Attributes:
        calls: requests to the cloud, failed ones included.
        tokens: in and out together.
        usd: dollars.
        seconds: on the clock, over all runs that share a journal.
    """

    calls: int | None = None
    tokens: int | None = None
    usd: float | None = None
    seconds: float | None = None

    def __post_init__(self) -> None:
        for name in ("calls", "tokens", "usd", "seconds"):
            limit = getattr(self, name)
            if limit is not None and not (math.isfinite(limit) and limit >= 0):
                raise InputError(f"{name} of the budget is {limit}, expected 0 or more, or None for no limit")

    def missing(self, cost: Cost) -> str:
        """What of the budget this is too much for, in words; nothing where it fits."""
        for name, limit, amount in (
            ("calls", self.calls, cost.calls),
            ("tokens", self.tokens, cost.tokens),
            ("usd", self.usd, cost.usd),
        ):
            if limit is not None and amount > limit * (1 + 1e-12):
                return f"{name} would be {amount:g} of {limit:g}"
        return ""


class Purse:
    """Spends a budget; many threads may use it.

    Args:
        budget: the limits.
        journal: a file to keep books in, and to go on from; None: in memory.
        clock: seconds, for tests.

    Raises:
        InputError, DataError: the journal cannot be written, or is none.

    Example:
        >>> purse = Purse(Budget(calls=1))
        >>> ticket = purse.reserve(Cost(calls=1, tokens_in=100))
        >>> purse.settle(ticket, Cost(calls=1, tokens_in=7))
        >>> purse.spent
        Cost(calls=1, tokens_in=7, tokens_out=0, usd=0.0)
    """

    def __init__(
        self, budget: Budget | None = None, *, journal: Path | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.budget = budget or Budget()
        self._clock = clock
        self._lock = threading.Lock()
        self._paid = Cost()
        self._open: dict[int, Cost] = {}
        self._next = 0
        self._seconds_before = 0.0
        self._file: BinaryIO | None = None
        if journal is not None:
            self._read(journal)
            try:
                self._file = journal.open("ab")
            except OSError as error:
                raise InputError(f"the journal {journal} cannot be written: {error.strerror}") from None
        self._started = clock()

    @property
    def spent(self) -> Cost:
        """All that is paid, and in full what may have been."""
        with self._lock:
            return self._spent()

    @property
    def seconds(self) -> float:
        """On the clock, earlier runs of this journal included."""
        return self._seconds_before + self._clock() - self._started

    @property
    def seconds_left(self) -> float:
        """Until the budget's end; infinite without one."""
        return math.inf if self.budget.seconds is None else self.budget.seconds - self.seconds

    def reserve(self, most: Cost) -> int:
        """Set aside what a request may cost.

        Returns:
            A ticket for `settle`.

        Raises:
            BudgetError: there is no room for it, or no time is left.
        """
        with self._lock:
            if self.seconds_left <= 0:
                raise BudgetError(f"the budget of {self.budget.seconds:g} seconds is over, so nothing more is sent")
            lacking = self.budget.missing(self._spent() + most)
            if lacking:
                raise BudgetError(f"the budget leaves no room for another request ({lacking}), so it is not sent")
            ticket, self._next = self._next, self._next + 1
            # On the disk before anything is sent: a process that is killed has sent at most what stands here.
            self._write({"ticket": ticket, "most": asdict(most)}, is_urgent=True)
            self._open[ticket] = most
            return ticket

    def settle(self, ticket: int, paid: Cost) -> None:
        """Say what it came to. A cloud that charges more than is possible is believed: it counts."""
        with self._lock:
            del self._open[ticket]
            self._paid += paid
            self._write({"ticket": ticket, "paid": asdict(paid)})

    def close(self) -> None:
        """Close the journal."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _spent(self) -> Cost:
        return sum(self._open.values(), self._paid)

    def _write(self, line: dict[str, Any], *, is_urgent: bool = False) -> None:
        if self._file is None:
            return
        self._file.write(json.dumps({**line, "seconds": round(self.seconds, 3)}).encode() + b"\n")
        self._file.flush()
        if is_urgent:
            os.fsync(self._file.fileno())

    def _read(self, journal: Path) -> None:
        """Take over what earlier runs did; a last line that was cut was followed by no request."""
        for number, line in enumerate(whole_lines(journal, max_bytes=MAX_JOURNAL_BYTES), start=1):
            try:
                fields = json.loads(line)
                ticket = fields["ticket"]
                if "most" in fields:
                    self._open[ticket] = Cost.from_fields(fields["most"])
                    self._next = max(self._next, ticket + 1)
                else:
                    paid = Cost.from_fields(fields["paid"])
                    del self._open[ticket]
                    self._paid += paid
                self._seconds_before = max(self._seconds_before, float(fields["seconds"]))
            except (ValueError, KeyError, TypeError):
                raise DataError("is no line of a journal; start in another folder", path=journal, line=number) from None

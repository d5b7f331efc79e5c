"""An algorithm whose learning rates fall from round to round along half a cosine, as Loshchilov and Hutter have it
(arXiv 1608.03983) without restarts.

    round t of T:   lr_t = lr (least + (1 - least) (1 + cos(pi (t - 1) / T)) / 2)

Symbols: lr each `learning_rate` of the algorithm inside, of devices and server alike; least the share of it that is
left at the end. Rounds after T keep the least. A device's optimiser begins anew in every round, so its first steps are
as long as the learning rate is: a rate that is right for the first rounds is too large for the last ones.

Wire, memory and state are those of the algorithm inside. An algorithm whose steps are replayed later, with the one
learning rate that its settings name, cannot be annealed: `cotune.federation.algorithms.REPLAYED`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from cotune.federation.algorithm import Algorithm, Combine, Plan, Update
from cotune.federation.arrays import Arrays
from cotune.federation.number_ranges import check_at_least, check_share

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class CosineRates:
    """lr_t / lr by round.

    Example:
        >>> [round(CosineRates(num_rounds=2, least=0.1).share(number), 3) for number in (1, 2, 3, 9)]
        [1.0, 0.55, 0.1, 0.1]
    """

    num_rounds: int
    """T."""
    least: float = 0.1
    """Share of the learning rates that is left; 1: they stay as they are."""

    def __post_init__(self) -> None:
        check_at_least(1, num_rounds=self.num_rounds)
        check_share(least=self.least)

    def share(self, round_number: int) -> float:
        """Of the learning rates in a round, counted from 1."""
        passed = min(round_number - 1, self.num_rounds) / self.num_rounds
        return self.least + (1 - self.least) * (1 + math.cos(math.pi * passed)) / 2


@dataclass(frozen=True, kw_only=True)
class Annealed(CosineRates):
    """The server half; the devices' half is that of the algorithm inside.

    Example:
        >>> from cotune.federation.rolora import RoLora
        >>> annealed = Annealed(inner=RoLora(), num_rounds=2, least=0.1)
        >>> [round(annealed.share(number), 3) for number in (1, 2, 3, 9)]
        [1.0, 0.55, 0.1, 0.1]
    """

    inner: Algorithm
    """Its learning rates are those of the first round."""

    def start(self, adapter: Arrays) -> Arrays:
        return self.inner.start(adapter)

    def plan(self, state: Arrays, round_number: int, device: str, since: int | None) -> Plan:
        return self._in(round_number).plan(state, round_number, device, since)

    def merge(self, state: Arrays, round_number: int, updates: Sequence[Update], combine: Combine) -> Arrays:
        return self._in(round_number).merge(state, round_number, updates, combine)

    def adapter(self, state: Arrays) -> dict[str, NDArray[np.float32]]:
        return self.inner.adapter(state)

    def _in(self, round_number: int) -> Algorithm:
        return at_rate(self.inner, self.share(round_number))


def at_rate(kind: T, share: float) -> T:
    """A dataclass with each of its fields `learning_rate`, in tables within it too, times `share`.

    Example:
        >>> from cotune.federation.fedit import FedIT
        >>> at_rate(FedIT(), 0.5).steps.learning_rate
        0.0005
    """
    found: dict[str, Any] = {}
    for one in fields(kind):  # type: ignore[arg-type]
        value = getattr(kind, one.name)
        if one.name == "learning_rate":
            found[one.name] = value * share
        elif is_dataclass(value) and not isinstance(value, type):
            found[one.name] = at_rate(value, share)
    return replace(kind, **found)  # type: ignore[type-var]

"""The tiny interface of every federated algorithm: a server half of pure functions over arrays, and a device's work.

Server, round by round, as `cotune.federation.coordinator` drives it:

    state = algorithm.start(adapter)
    plan  = algorithm.plan(state, round_number, device, since)      what the device gets and does
    state = algorithm.merge(state, round_number, updates, combine)  what came of it
    adapter = algorithm.adapter(state)                              to be judged, saved and used

Device: the plan names one of `cotune.federation.works.WORKS`, which does it on a `LocalModel`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from cotune.federation.arrays import AnyArrays, Arrays, Shapes, from_vector, shapes_of, to_vector
from cotune.federation.local_model import LocalModel

Setting = bool | int | float | str
# Settings of a task that its work does not see. The round whose arrays the device shall have, `NEW` for none: then it
# forgets what it has. The coordinator writes it; a plan that does so itself has the last word.
SINCE = "since"
NEW = -1
# The round as the algorithm counts it, where that is not the coordinator's number.
ROUND = "algorithm.round"
# Numbers of a state that are shown with each round: arrays (1,) under this name, such as `shown/discarded_energy`.
SHOWN = "shown/"
# How the updates of n devices become one: (n, d) float32 and weights (n,) float64 give (d,) float32.
Combine = Callable[[NDArray[np.float32], NDArray[np.float64]], NDArray[np.float32]]
# The seed of direction `index` of a round, below 2^63; both sides derive it from the run's secret.
DirectionSeeds = Callable[[int, int], int]


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What one device shall do in one round.

    Attributes:
        work: a name in `WORKS`, or one that devices of a special kind know, as those of `coplms`.
        arrays: what it lacks of the state, by name; it keeps them for later rounds.
        settings: of the work.
        reply: shapes of the arrays that it shall send.
        codes: which of these are uint8; all others are float32.
        decode: the numbers that the reply stands for; checks and rules see these.
    """

    work: str
    arrays: AnyArrays
    settings: Mapping[str, Setting]
    reply: Shapes
    codes: frozenset[str] = frozenset()
    decode: Callable[[AnyArrays], Arrays] = lambda arrays: arrays


@dataclass(frozen=True, kw_only=True)
class Update:
    """A device's reply that has passed all checks.

    Attributes:
        device: who.
        arrays: what it sent.
        weight: of its share in a mean, above 0; not what the device claims, see `coordinator`.
    """

    device: str
    arrays: Arrays
    weight: float = 1.0


class Algorithm(Protocol):
    """The server half. A state is named arrays and nothing else, so it can be saved, compared and sent."""

    def start(self, adapter: Arrays) -> Arrays:
        """The state before round 1."""
        ...

    def plan(self, state: Arrays, round_number: int, device: str, since: int | None) -> Plan:
        """What `device` gets and does.

        Args:
            state: after the last accepted round.
            round_number: counted from 1.
            device: its name.
            since: the round whose plan's arrays it has, together with all before; None if it has nothing.
        """
        ...

    def merge(self, state: Arrays, round_number: int, updates: Sequence[Update], combine: Combine) -> Arrays:
        """The state after the round.

        Args:
            state: before it; stays as it is.
            round_number: counted from 1.
            updates: at least one, in order of the devices' names.
            combine: how updates become one.
        """
        ...

    def adapter(self, state: Arrays) -> dict[str, NDArray[np.float32]]:
        """The whole adapter of a state."""
        ...


@dataclass(frozen=True, kw_only=True)
class Job:
    """What a device's work is given.

    Attributes:
        round_number: as the algorithm counts it, from 1.
        arrays: all that the device holds of the state, what just came included.
        settings: of the plan.
        model: its model and texts.
        seeds: of directions.
        batch_seed: of the order of texts; differs from device to device and from round to round.
        memory: arrays of any type that the device keeps for itself from round to round; the work may change it.
        run_id: names the run, for works that keep something on disk.
    """

    round_number: int
    arrays: Arrays
    settings: Mapping[str, Setting]
    model: LocalModel
    seeds: DirectionSeeds
    batch_seed: int = 0
    memory: dict[str, NDArray[Any]] = field(default_factory=dict)
    run_id: str = ""


@dataclass(frozen=True, kw_only=True)
class Done:
    """What came of it.

    Attributes:
        arrays: to be sent; shapes as in the plan.
        loss: nats per token, before or during the work; nan where the work has none.
        metrics: what else it measured, finite numbers; sent in clear text, so nothing private.
    """

    arrays: AnyArrays
    loss: float
    metrics: Mapping[str, float] = field(default_factory=dict)


# A device's half of an algorithm.
Work = Callable[[Job], Done]


def shown_in(state: Arrays) -> dict[str, float]:
    """The numbers that a state shows, also where it is that of an algorithm within another one.

    Example:
        >>> shown_in({"inner/shown/discarded_energy": np.ones(1, np.float32), "b": np.zeros(2, np.float32)})
        {'discarded_energy': 1.0}
    """
    return {
        name.rpartition(SHOWN)[2]: float(array[0])
        for name, array in sorted(state.items())
        if f"/{name}".rpartition(f"/{SHOWN}")[1]
    }


def mean_of(updates: Sequence[Update], combine: Combine, names: Sequence[str]) -> dict[str, NDArray[np.float32]]:
    """The combination of some arrays of all updates, taken as one vector so that distances see all of them.

    Example:
        >>> halves = [Update(device=d, arrays={"x": np.array([v], np.float32)}) for d, v in (("a", 1), ("b", 2))]
        >>> mean_of(halves, lambda updates, weights: updates.mean(0), ["x"])
        {'x': array([1.5], dtype=float32)}
    """
    parts = [{name: one.arrays[name] for name in names} for one in updates]
    rows = np.stack([to_vector(part) for part in parts])
    return from_vector(combine(rows, np.array([one.weight for one in updates], np.float64)), shapes_of(parts[0]))

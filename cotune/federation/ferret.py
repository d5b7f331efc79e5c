"""Ferret (Shu et al., ICML 2025, arXiv 2409.06277): first-order steps whose change travels as K coordinates.

    on device c:  delta_c = what some steps of back-propagation changed;  c_ck = <delta_c,g , z_k>  for the K_g
                  directions k of each group g
    server:       w_g <- w_g + slr sum_k limit(C_k / K_g) z_k,    C_k = combine_c(c_ck)

Symbols: a group g is one array of d_g numbers; z_k in {-1, 1}^{d_g}, from the run's secret, the round and k. As
E[z z^T] = I, the mean of <delta, z> z over directions is delta on average, without a factor: the published scale,
d_g / K_g, is that of normals cut at 1 / sqrt(d_g). The mean is long where d_g exceeds K_g:

    E |mean|^2 = |delta|^2 (1 + (d_g - 1) / K_g)

so slr = 1 follows the devices on average, and K_g / (K_g + d_g - 1) is the scale of least squared error. `limit` keeps
each direction's move, |C_k / K_g| sqrt(d_g), to a norm of `max_move_norm`, as published.

The K directions are split by the groups' norms. A norm is known from coordinates: E <delta, z>^2 = |delta|^2. Differs
from the released code: there each device splits by its own norms and draws places, K for the group of the largest
norm; here the server splits by the norms of the last step, in the first round by sqrt(d_g), so that entry k means the
same on all devices and robust rules work, and K is all that is sent. One direction at least for each group.

Wire: K float32 up; K + G down for each missed round and G for the split, G groups; whoever is new the adapter and the
kept steps. Memory on the device: that of back-propagation. It saves bytes, not memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from cotune.errors import InputError
from cotune.federation.algorithm import Combine, DirectionSeeds, Done, Job, Plan, Update, mean_of
from cotune.federation.arrays import Arrays
from cotune.federation.catch_up import caught_up, first_state, lacked, whole_adapter, with_step
from cotune.federation.descend import names_like, steps_as_settings, steps_of
from cotune.federation.local_model import LocalSteps
from cotune.federation.number_ranges import check_at_least, check_at_most, check_positive
from cotune.federation.replay import MAX_DIRECTIONS, coordinates, moved

COORDINATES, SPLIT = "coordinates", "split"


@dataclass(frozen=True, kw_only=True)
class Ferret:
    """The server half; `send_coordinates` is the device's.

    The state is that of `cotune.federation.catch_up`, with `split` (G,), directions of each group in the round to come;
    a step is the combined coordinates and the split that they were measured with, (K + G,).
    """

    seeds: DirectionSeeds
    """Of directions, from the run's secret."""
    steps: LocalSteps = field(default_factory=LocalSteps)
    """Of each device in each round."""
    num_directions: int = 512
    """K, of a round, for all groups together."""
    server_learning_rate: float = 1.0
    """slr."""
    max_move_norm: float = 10.0
    """Of each direction's move, before slr."""
    tuned: str = "*"
    """Pattern of the arrays that are trained."""
    keep_steps: int = 256
    """Rounds after which a device that was away gets the adapter instead of the steps that it missed."""

    def __post_init__(self) -> None:
        check_at_least(1, num_directions=self.num_directions, keep_steps=self.keep_steps)
        check_at_most(MAX_DIRECTIONS, num_directions=self.num_directions)
        check_positive(server_learning_rate=self.server_learning_rate, max_move_norm=self.max_move_norm)

    def start(self, adapter: Arrays) -> Arrays:
        sizes = np.array([adapter[name].size for name in names_like(adapter, self.tuned)], np.float64)
        if self.num_directions < len(sizes):
            raise InputError(
                f"num_directions is {self.num_directions}, expected at least {len(sizes)}, one for each trained array"
            )
        return dict(first_state(adapter, self.tuned)) | {SPLIT: split_by_norms(np.sqrt(sizes), self.num_directions)}

    def plan(self, state: Arrays, round_number: int, device: str, since: int | None) -> Plan:
        settings = steps_as_settings(self.steps) | {
            "trained": self.tuned,
            "server_learning_rate": self.server_learning_rate,
            "max_move_norm": self.max_move_norm,
        }
        return Plan(
            work="ferret",
            arrays=lacked(state, round_number, since) | {SPLIT: state[SPLIT]},
            settings=settings,
            reply={COORDINATES: (self.num_directions,)},
        )

    def merge(self, state: Arrays, round_number: int, updates: Sequence[Update], combine: Combine) -> Arrays:
        combined = mean_of(updates, combine, [COORDINATES])[COORDINATES]
        step = np.concatenate([combined, state[SPLIT]])
        found = with_step(state, round_number, step, self._after, keep_steps=self.keep_steps)
        ends = np.cumsum(state[SPLIT].astype(np.int64))[:-1]
        norms = np.array([np.sqrt(np.square(one, dtype=np.float64).mean()) for one in np.split(combined, ends)])
        return found | {SPLIT: split_by_norms(norms, self.num_directions)}

    def adapter(self, state: Arrays) -> dict[str, NDArray[np.float32]]:
        return whole_adapter(state)

    def _after(self, tuned: Arrays, round_number: int, step: NDArray[np.float32]) -> dict[str, NDArray[np.float32]]:
        seeds = [self.seeds(round_number, k) for k in range(self.num_directions)]
        return after_step(
            tuned, step, seeds, server_learning_rate=self.server_learning_rate, max_move_norm=self.max_move_norm
        )


def split_by_norms(norms: NDArray[np.float64], num_directions: int) -> NDArray[np.float32]:
    """Directions of each group in proportion to its norm, one at least, `num_directions` in all; float32 (G,).

    Example:
        >>> split_by_norms(np.array([3.0, 0.0, 1.0]), 9).tolist()
        [6.0, 1.0, 2.0]
    """
    total = norms.sum()
    shares = norms / total if 0 < total < float("inf") else np.full(len(norms), 1 / len(norms))
    free = shares * (num_directions - len(norms))
    split = 1 + np.floor(free)
    # What is left goes to the largest remainders, the first of equals.
    order = np.argsort(np.floor(free) - free, kind="stable")
    split[order[: num_directions - int(split.sum())]] += 1
    return np.asarray(split, np.float32)


def after_step(
    tuned: Arrays,
    step: NDArray[np.float32],
    seeds: Sequence[int],
    *,
    server_learning_rate: float,
    max_move_norm: float,
) -> dict[str, NDArray[np.float32]]:
    """w + slr sum_k limit(C_k / K_g) z_k, the same bits on every device.

    Args:
        tuned: the arrays before it.
        step: combined coordinates and the split, (K + G,).
        seeds: of the K directions.
        server_learning_rate: slr.
        max_move_norm: of one direction.
    """
    found: dict[str, NDArray[np.float32]] = {}
    first, num_groups = 0, len(tuned)
    for name, num in zip(sorted(tuned), step[-num_groups:].astype(int).tolist(), strict=True):
        most = max_move_norm / np.sqrt(tuned[name].size)
        amounts = np.clip(step[first : first + num].astype(np.float64) / num, -most, most) * server_learning_rate
        found |= moved({name: tuned[name]}, seeds[first : first + num], amounts.tolist())
        first += num
    return found


def send_coordinates(job: Job) -> Done:
    """The device's half: catch up, train, and measure the change along the K directions."""
    settings, pattern = job.settings, str(job.settings["trained"])

    def after(tuned: Arrays, number: int, step: NDArray[np.float32]) -> dict[str, NDArray[np.float32]]:
        return after_step(
            tuned,
            step,
            [job.seeds(number, k) for k in range(len(step) - len(tuned))],
            server_learning_rate=float(settings["server_learning_rate"]),
            max_move_norm=float(settings["max_move_norm"]),
        )

    adapter = caught_up(job, pattern, after)
    names = names_like(adapter, pattern)
    trained = job.model.descend(adapter, names, steps_of(settings), seed=job.batch_seed)
    found: list[NDArray[np.float64]] = []
    first = 0
    for name, num in zip(names, job.arrays[SPLIT].astype(int).tolist(), strict=True):
        seeds = [job.seeds(job.round_number, k) for k in range(first, first + num)]
        found.append(coordinates({name: trained.arrays[name] - adapter[name]}, seeds))
        first += num
    return Done(arrays={COORDINATES: np.concatenate(found).astype(np.float32)}, loss=trained.loss)

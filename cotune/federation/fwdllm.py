"""FwdLLM (Xu et al., USENIX ATC 2024): forward gradients, and no step before enough of them agree.

    on device c:  grad_c = sum_j g_cj v_cj over P directions,  g_cj = (L(theta + h v_cj) - L(theta - h v_cj)) / (2 h)
    server:  M_1, M_2 = means of g v over the two halves of all replies since the last step
             variance = mean over tuned numbers of (M_1 - M_2)^2 / 2
             theta <- theta - lr mean(g v)  when variance <= max_variance; else they wait for the replies of more rounds

Symbols: v_cj in {-1, 1}^d, drawn by each device for itself; the next batch of texts with each j. With `num_candidates`
C above 1 a device draws C P seeds and takes the P directions with the largest |cosine| to the last step's gradient. All
have the norm sqrt(d), so the cosines are compared by inner products, one direction at a time, and none is kept.

Differs from the released code: the variance is over all that is tuned, not over one layer that is chosen for each
model; a choice is of whole directions instead of each tensor's apart; directions of signs instead of Gaussian ones; a
step is taken after `max_rounds_waiting` rounds all the same. Each half of a round's replies is combined by the rule, so
a robust rule that is named needs twice the replies that it would otherwise. The same idea at K numbers instead of d is
the option `gate` of `cotune.federation.seed`.

Wire: d float32 up; d down after a step and none while replies wait, and with candidates d more after a step, the
gradient; whoever is new gets the whole adapter. Memory on the device: that of inference, and 8 d bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cotune.errors import InputError
from cotune.federation.algorithm import Combine, Done, Job, Plan, Setting, Update, mean_of
from cotune.federation.arrays import Arrays, shapes_of
from cotune.federation.catch_up import NOW, prefixed, under
from cotune.federation.descend import names_like
from cotune.federation.number_ranges import check_at_least, check_at_most, check_positive
from cotune.federation.replay import MAX_DIRECTIONS, coordinates, summed
from cotune.tuning.directions import direction_seed

HALVES = ("half1/", "half2/")
GRADIENT, COUNTS, ROUNDS = "gradient/", "counts", "rounds"


@dataclass(frozen=True, kw_only=True)
class FwdLLM:
    """The server half; `send_forward_gradient` is the device's.

    A state has `now/NAME`, the adapter; `half1/NAME` and `half2/NAME`, sums of what waits; `counts` (2,), the replies
    in them; `rounds` (2,), how many rounds they wait and the round of the last step; and, with candidates,
    `gradient/NAME` of that step.
    """

    num_perturbations: int = 8
    """P, of a device in a round."""
    num_candidates: int = 1
    """C, seeds that are drawn for each direction that is taken; published 10."""
    learning_rate: float = 1e-2
    zo_eps: float = 1e-2
    """h, in units of the tuned numbers."""
    batch_size: int = 8
    """Texts for one direction."""
    max_variance: float = 0.1
    """The gate, (nats per token and unit of a parameter)^2. Published 0.1 to 0.2, for one layer."""
    max_rounds_waiting: int = 8
    """Rounds after which a step is taken in any case."""
    tuned: str = "*lora_B*"
    """Pattern of the arrays that move."""

    def __post_init__(self) -> None:
        check_at_least(
            1,
            num_perturbations=self.num_perturbations,
            num_candidates=self.num_candidates,
            batch_size=self.batch_size,
            max_rounds_waiting=self.max_rounds_waiting,
        )
        check_at_most(MAX_DIRECTIONS, num_perturbations=self.num_perturbations)
        check_at_most(MAX_DIRECTIONS // self.num_perturbations, num_candidates=self.num_candidates)
        check_positive(learning_rate=self.learning_rate, zo_eps=self.zo_eps)
        if not self.max_variance > 0:
            raise InputError(f"max_variance is {self.max_variance}, expected a positive number; inf opens the gate")

    def start(self, adapter: Arrays) -> Arrays:
        state = prefixed(NOW, adapter) | self._nothing_waits(adapter) | {ROUNDS: np.zeros(2, np.float32)}
        if self.num_candidates > 1:
            state |= prefixed(GRADIENT, _zeros(adapter, names_like(adapter, self.tuned)))
        return state

    def plan(self, state: Arrays, round_number: int, device: str, since: int | None) -> Plan:
        adapter = under(NOW, state)
        tuned = names_like(adapter, self.tuned)
        if since is None:
            arrays = prefixed(NOW, adapter)
        elif int(state[ROUNDS][1]) >= since:
            arrays = prefixed(NOW, {name: adapter[name] for name in tuned})
        else:
            arrays = {}
        if arrays:
            arrays |= prefixed(GRADIENT, under(GRADIENT, state))
        settings: dict[str, Setting] = {
            "num_perturbations": self.num_perturbations,
            "num_candidates": self.num_candidates,
            "zo_eps": self.zo_eps,
            "batch_size": self.batch_size,
            "tuned": self.tuned,
        }
        return Plan(
            work="fwdllm", arrays=arrays, settings=settings, reply={name: adapter[name].shape for name in tuned}
        )

    def merge(self, state: Arrays, round_number: int, updates: Sequence[Update], combine: Combine) -> Arrays:
        adapter = under(NOW, state)
        tuned = names_like(adapter, self.tuned)
        counts = state[COUNTS].astype(np.float64)
        sums = [{name: state[half + name].astype(np.float64) for name in tuned} for half in HALVES]
        for index, replies in enumerate(_halves(updates, counts)):
            if replies:
                mean = mean_of(replies, combine, tuned)
                sums[index] = {name: sums[index][name] + len(replies) * mean[name].astype(np.float64) for name in tuned}
                counts[index] += len(replies)
        rounds = int(state[ROUNDS][0]) + 1
        variance = variance_of_halves(sums, counts * self.num_perturbations)
        found = dict(state)
        if variance > self.max_variance and rounds < self.max_rounds_waiting:
            for half, each in zip(HALVES, sums, strict=True):
                found |= prefixed(half, {name: array.astype(np.float32) for name, array in each.items()})
            return found | {
                COUNTS: counts.astype(np.float32),
                ROUNDS: np.array([rounds, state[ROUNDS][1]], np.float32),
            }
        num = counts.sum() * self.num_perturbations
        gradient = {name: (sums[0][name] + sums[1][name]) / num for name in tuned}
        found |= prefixed(
            NOW, {n: (adapter[n] - self.learning_rate * array).astype(np.float32) for n, array in gradient.items()}
        )
        if self.num_candidates > 1:
            found |= prefixed(GRADIENT, {name: array.astype(np.float32) for name, array in gradient.items()})
        return found | self._nothing_waits(adapter) | {ROUNDS: np.array([0, round_number], np.float32)}

    def adapter(self, state: Arrays) -> dict[str, NDArray[np.float32]]:
        return under(NOW, state)

    def _nothing_waits(self, adapter: Arrays) -> dict[str, NDArray[np.float32]]:
        found = {COUNTS: np.zeros(2, np.float32)}
        for half in HALVES:
            found |= prefixed(half, _zeros(adapter, names_like(adapter, self.tuned)))
        return found


def variance_of_halves(sums: Sequence[Arrays | dict[str, NDArray[np.float64]]], counts: NDArray[np.float64]) -> float:
    """How far the means of both halves are apart; inf where one is empty.

    Args:
        sums: of g v, for each half.
        counts: directions in each, (2,).

    Example:
        >>> variance_of_halves([{"b": np.array([2.0, 4.0])}, {"b": np.array([0.0, 9.0])}], np.array([2.0, 3.0]))
        0.5
    """
    if not counts.all():
        return float("inf")
    apart = np.concatenate(
        [(sums[0][name] / counts[0] - sums[1][name] / counts[1]).reshape(-1) for name in sorted(sums[0])]
    )
    return float(np.square(apart).mean() / 2)


def send_forward_gradient(job: Job) -> Done:
    """The device's half: slopes along P directions at the same theta, and their sum times the directions."""
    settings, adapter = job.settings, under(NOW, job.arrays)
    tuned = names_like(adapter, str(settings["tuned"]))
    num = int(settings["num_perturbations"])
    seeds = [direction_seed(job.batch_seed, index) for index in range(num * int(settings["num_candidates"]))]
    seeds = best_by_cosine(under(GRADIENT, job.arrays), seeds, num)
    slopes = []
    with job.model.walk(adapter, tuned, batch_size=int(settings["batch_size"]), seed=job.batch_seed) as walk:
        for index, seed in enumerate(seeds):
            if index:
                walk.next_batch()
            slopes.append(walk.slope(seed, float(settings["zo_eps"])))
        loss = walk.loss
    total = summed(shapes_of({name: adapter[name] for name in tuned}), seeds, slopes)
    return Done(arrays={name: array.astype(np.float32) for name, array in total.items()}, loss=loss)


def best_by_cosine(gradient: Arrays, seeds: Sequence[int], num: int) -> list[int]:
    """The seeds of the directions with the largest |cosine| to a gradient, in their order; the first without one."""
    if len(seeds) == num or not any(array.any() for array in gradient.values()):
        return list(seeds[:num])
    order = np.argsort(-np.abs(coordinates(gradient, seeds)), kind="stable")
    return [seeds[place] for place in sorted(order[:num])]


def _halves(updates: Sequence[Update], counts: NDArray[np.float64]) -> list[list[Update]]:
    """Replies in the order of their devices' names; an odd one goes where fewer wait."""
    ordered = sorted(updates, key=lambda one: one.device)
    first = len(ordered) // 2
    if len(ordered) % 2 and counts[0] <= counts[1]:
        first += 1
    return [ordered[:first], ordered[first:]]


def _zeros(adapter: Arrays, names: Sequence[str]) -> dict[str, NDArray[np.float32]]:
    return {name: np.zeros_like(adapter[name]) for name in names}

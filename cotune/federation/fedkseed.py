"""FedKSeed (Qin et al., arXiv 2312.06353): K seeds for the whole run, and a sum of slopes for each.

    theta = w0 - lr sum_s A_s z_s                                                    the model, out of the dictionary
    on device c, tau times:  s ~ uniform,  g = (L(theta + eps z_s) - L(theta - eps z_s)) / (2 eps),
                             theta <- theta - lr g z_s,    G_cs <- G_cs + g
    server:  A_s <- A_s + combine_c(G_cs)

Symbols: z_s in {-1, 1}^d, the direction of the pool's seed s; the next batch of texts with each of the tau steps. Seeds
and A travel as published, so whoever reads along has the tuned model (`cotune.federation.seed_attacks`); and each
device fills about tau of the K places, so a median over devices is 0 almost everywhere. `cotune.federation.seed` has
neither fault.

Exact: all A are multiples of 2^-20, to which the server rounds them, below the noise of a slope in float32. Sums of
such numbers in float64 are exact in any order, and theta is rounded once. So a device may keep the sum and add what
changed in A, and has the bits of a replay from nothing on another machine; with rounded sums it would not.

Differs from the paper: directions of signs instead of Gaussian ones; a part of the adapter, LoRA's B by default,
instead of all parameters, because replay costs K d signs; a device whose loss is not finite says so instead of skipping
the step.

Wire: K float32 up, K float32 down; whoever is new also gets w0 and the K seeds, as float32. Memory on the device: that
of inference, and 8 d bytes for the sum.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cotune.errors import InputError
from cotune.federation.algorithm import Combine, Done, Job, Plan, Setting, Update, mean_of
from cotune.federation.arrays import Arrays, shapes_of
from cotune.federation.catch_up import START, prefixed, under
from cotune.federation.descend import names_like
from cotune.federation.number_ranges import check_at_least, check_positive
from cotune.federation.replay import summed

SEEDS, ACCUMULATORS, CHANGE = "seeds", "accumulators", "change"
SUM, REPLAYED = "sum/", "replayed"
GRID = 2.0**-20
LARGEST_SUM = 2.0**31
"""Of all |A|: with what devices add in between, far below 2^53 grid steps, where float64 would begin to round."""
NUM_POSSIBLE_SEEDS = 2**24
"""Whole numbers that float32 holds."""


@dataclass(frozen=True, kw_only=True)
class FedKSeed:
    """The server half; `walk_the_pool` is the device's.

    A state has `start/NAME`, w0; `seeds` (K,), whole numbers; and `accumulators` (K,), A.
    """

    num_seeds: int = 1024
    """K. The paper has 4096, and 1024 in its examples."""
    num_steps: int = 200
    """tau, of a device in a round."""
    learning_rate: float = 1e-3
    """Published for all parameters of models of 1 and 3 billion: 3e-7."""
    zo_eps: float = 1e-3
    """eps, in units of the tuned numbers; published 5e-4."""
    batch_size: int = 8
    """Texts of a step; published 1."""
    tuned: str = "*lora_B*"
    """Pattern of the arrays that move."""
    pool_seed: int = 0
    """Of the draw of the K seeds."""

    def __post_init__(self) -> None:
        check_at_least(1, num_seeds=self.num_seeds, num_steps=self.num_steps, batch_size=self.batch_size)
        if self.num_seeds > NUM_POSSIBLE_SEEDS:
            raise InputError(f"num_seeds is {self.num_seeds}, expected at most {NUM_POSSIBLE_SEEDS}")
        check_positive(learning_rate=self.learning_rate, zo_eps=self.zo_eps)
        check_at_least(0, pool_seed=self.pool_seed)

    def start(self, adapter: Arrays) -> Arrays:
        names_like(adapter, self.tuned)
        seeds = np.random.default_rng(self.pool_seed).choice(NUM_POSSIBLE_SEEDS, self.num_seeds, replace=False)
        return prefixed(START, adapter) | {
            SEEDS: seeds.astype(np.float32),
            ACCUMULATORS: np.zeros(self.num_seeds, np.float32),
        }

    def plan(self, state: Arrays, round_number: int, device: str, since: int | None) -> Plan:
        settings: dict[str, Setting] = {
            "num_steps": self.num_steps,
            "learning_rate": self.learning_rate,
            "zo_eps": self.zo_eps,
            "batch_size": self.batch_size,
            "tuned": self.tuned,
        }
        return Plan(
            work="fedkseed",
            arrays=state if since is None else {ACCUMULATORS: state[ACCUMULATORS]},
            settings=settings,
            reply={CHANGE: (self.num_seeds,)},
        )

    def merge(self, state: Arrays, round_number: int, updates: Sequence[Update], combine: Combine) -> Arrays:
        change = mean_of(updates, combine, [CHANGE])[CHANGE].astype(np.float64)
        accumulators = state[ACCUMULATORS] + change
        total = float(np.abs(accumulators).sum())
        if not total <= LARGEST_SUM:
            raise InputError(
                f"the accumulators' sizes add up to {total:.3g}, expected at most {LARGEST_SUM:.3g}; lower the "
                "learning rate, or choose a rule that bounds what one device can do"
            )
        return dict(state) | {ACCUMULATORS: on_grid(accumulators)}

    def adapter(self, state: Arrays) -> dict[str, NDArray[np.float32]]:
        start = under(START, state)
        return start | replayed(start, names_like(start, self.tuned), state, self.learning_rate)


def on_grid(values: NDArray[np.float64]) -> NDArray[np.float32]:
    """The nearest multiples of 2^-20 that float32 holds; large numbers of float32 all are such multiples.

    Example:
        >>> on_grid(np.array([2.0**-21 * 3, 1.0])).tolist() == [2.0**-19, 1.0]
        True
    """
    rounded: NDArray[np.float64] = np.round(values / GRID) * GRID
    return rounded.astype(np.float32)


def replayed(
    start: Arrays, tuned: Sequence[str], dictionary: Arrays, learning_rate: float
) -> dict[str, NDArray[np.float32]]:
    """The tuned arrays out of `seeds` and `accumulators`, from nothing; the same bits everywhere."""
    moving = {name: start[name] for name in tuned}
    sums = summed(shapes_of(moving), seeds_of(dictionary), dictionary[ACCUMULATORS].astype(np.float64).tolist())
    return _settled(moving, sums, learning_rate)


def seeds_of(dictionary: Arrays) -> list[int]:
    """The pool."""
    return [int(seed) for seed in dictionary[SEEDS]]


def walk_the_pool(job: Job) -> Done:
    """The device's half: come to theta, then tau steps along directions drawn from the pool."""
    drawn, slopes, loss = walk_along_drawn(job, None)
    return Done(arrays={CHANGE: sums_by_seed(drawn, slopes, len(job.arrays[SEEDS]))}, loss=loss)


def walk_along_drawn(
    job: Job, probabilities: NDArray[np.float64] | None
) -> tuple[NDArray[np.int64], NDArray[np.float64], float]:
    """tau steps.

    Args:
        job: of the device.
        probabilities: (K,), of the draw; None draws all alike.

    Returns:
        Places in the pool, int64 (tau,); slopes (tau,); mean loss.
    """
    settings, seeds = job.settings, seeds_of(job.arrays)
    num, learning_rate = int(settings["num_steps"]), float(settings["learning_rate"])
    adapter = _caught_up(job, learning_rate)
    tuned = names_like(adapter, str(settings["tuned"]))
    # Another stream than that of the order of texts.
    drawn = np.random.default_rng((job.batch_seed, 1)).choice(len(seeds), num, p=probabilities)
    slopes = np.empty(num, np.float64)
    with job.model.walk(adapter, tuned, batch_size=int(settings["batch_size"]), seed=job.batch_seed) as walk:
        for step, place in enumerate(drawn):
            if step:
                walk.next_batch()
            slopes[step] = walk.slope(seeds[place], float(settings["zo_eps"]))
            walk.move([seeds[place]], [-learning_rate * slopes[step]])
        return drawn, slopes, walk.loss


def sums_by_seed(drawn: NDArray[np.int64], values: NDArray[np.float64], num_seeds: int) -> NDArray[np.float32]:
    """For each place of the pool the sum of the values that were measured there, float32 (K,)."""
    return np.bincount(drawn, values, num_seeds).astype(np.float32)


def _caught_up(job: Job, learning_rate: float) -> dict[str, NDArray[np.float32]]:
    """The adapter before this round. The device remembers the sum, and the A that it was made of."""
    start = under(START, job.arrays)
    moving = {name: start[name] for name in names_like(start, str(job.settings["tuned"]))}
    before = job.memory.get(REPLAYED, np.zeros(len(job.arrays[SEEDS]), np.float32)).astype(np.float64)
    change = summed(shapes_of(moving), seeds_of(job.arrays), (job.arrays[ACCUMULATORS] - before).tolist())
    sums = {name: job.memory.get(SUM + name, 0.0) + array for name, array in change.items()}
    job.memory.update(prefixed(SUM, sums) | {REPLAYED: job.arrays[ACCUMULATORS].copy()})
    return start | _settled(moving, sums, learning_rate)


def _settled(
    moving: Arrays, sums: dict[str, NDArray[np.float64]], learning_rate: float
) -> dict[str, NDArray[np.float32]]:
    """w0 - lr sum, rounded once to float32."""
    return {name: (array - learning_rate * sums[name]).astype(np.float32) for name, array in moving.items()}

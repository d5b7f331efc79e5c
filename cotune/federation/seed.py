"""Seed mode: devices measure slopes along directions that all of them share, and only the slopes travel.

    on device c, step k of K:
        g_ck = (L(theta + eps z_k) - L(theta - eps z_k)) / (2 eps),    theta <- theta - lr g_ck z_k
    afterwards theta goes back to where the round began; the server combines over devices, and everyone replays:
    theta <- theta - lr sum_k G_k z_k,   G_k = combine_c(g_ck)

With P directions per step, as DeComFL has them, P slopes are measured at the same theta on the same batch, and the step
is their mean: theta <- theta - (lr / P) sum_k g_ck z_k over these P, and in the replay lr / P stands for lr.

The gate, FwdLLM's idea ("no step until enough agree") where it costs nothing: devices answer the same question, so
their disagreement is its error. G_k counts as 0 where

    |G_k| < gate e_k,    e_k = sqrt(combine_c((g_ck - G_k)^2) / (n - 1))

Symbols: n replies; with the mean of equal weights e_k is the standard error of the mean. The squares are combined by
the same rule, so that a robust one also keeps liars from closing the gate; under the plain mean a single liar can.

Symbols: z_k in {-1, 1}^d, the direction with the seed that both sides derive from the run's secret, the round and k;
the next batch of texts with each step. After DeComFL (Li et al., arXiv 2405.15861): unlike FedKSeed's independent draws
from a pool, entry k means the same for all devices, so medians, trimmed means, clipping, secure sums and signatures all
work on K numbers. What is tuned is a part of the adapter, LoRA's B by default: replay costs K d signs.

Wire: K float32 up, K float32 down; whoever missed rounds gets theirs too, and whoever is new the adapter, once. Memory
on the device: that of inference.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cotune.errors import InputError
from cotune.federation.algorithm import Combine, DirectionSeeds, Done, Job, Plan, Setting, Update, mean_of
from cotune.federation.arrays import Arrays
from cotune.federation.catch_up import caught_up, first_state, lacked, whole_adapter, with_step
from cotune.federation.descend import names_like
from cotune.federation.number_ranges import check_at_least, check_at_most, check_positive
from cotune.federation.replay import MAX_DIRECTIONS, moved

SLOPES = "slopes"


@dataclass(frozen=True, kw_only=True)
class SeedMode:
    """The server half; `measure_slopes` is the device's. The state is that of `cotune.federation.catch_up`; a step is
    the combined slopes, (K,)."""

    seeds: DirectionSeeds
    """Of directions, from the run's secret."""
    num_directions: int = 512
    """K, of a round."""
    num_directions_per_step: int = 1
    """P; a device takes K / P local steps."""
    learning_rate: float = 1e-3
    zo_eps: float = 1e-3
    """eps, in units of the tuned numbers."""
    batch_size: int = 8
    """Texts of a step."""
    tuned: str = "*lora_B*"
    """Pattern of the arrays that move."""
    keep_steps: int = 256
    """Rounds after which a device that was away gets the adapter instead of the steps that it missed."""
    gate: float | None = None
    """Standard errors that a direction's slope must reach to count; None: all count, as they do with one reply."""

    def __post_init__(self) -> None:
        check_at_least(
            1,
            num_directions=self.num_directions,
            num_directions_per_step=self.num_directions_per_step,
            batch_size=self.batch_size,
            keep_steps=self.keep_steps,
        )
        check_at_most(MAX_DIRECTIONS, num_directions=self.num_directions)
        if self.num_directions % self.num_directions_per_step:
            raise InputError(
                f"num_directions is {self.num_directions}, expected a multiple of num_directions_per_step, "
                f"{self.num_directions_per_step}"
            )
        if self.gate is not None and not 0 < self.gate < float("inf"):
            raise InputError(f"gate is {self.gate}, expected a positive number of standard errors, or none")
        check_positive(learning_rate=self.learning_rate, zo_eps=self.zo_eps)

    def start(self, adapter: Arrays) -> Arrays:
        return first_state(adapter, self.tuned)

    def plan(self, state: Arrays, round_number: int, device: str, since: int | None) -> Plan:
        settings: dict[str, Setting] = {
            "num_directions": self.num_directions,
            "num_directions_per_step": self.num_directions_per_step,
            "learning_rate": self.learning_rate,
            "zo_eps": self.zo_eps,
            "batch_size": self.batch_size,
            "tuned": self.tuned,
        }
        return Plan(
            work="seed",
            arrays=lacked(state, round_number, since),
            settings=settings,
            reply={SLOPES: (self.num_directions,)},
        )

    def merge(self, state: Arrays, round_number: int, updates: Sequence[Update], combine: Combine) -> Arrays:
        slopes = mean_of(updates, combine, [SLOPES])[SLOPES]
        if self.gate is not None and len(updates) > 1:
            slopes = np.where(np.abs(slopes) < self.gate * _errors(updates, slopes, combine), np.float32(0), slopes)
        return with_step(state, round_number, slopes, self._after, keep_steps=self.keep_steps)

    def adapter(self, state: Arrays) -> dict[str, NDArray[np.float32]]:
        return whole_adapter(state)

    def _after(self, tuned: Arrays, round_number: int, slopes: NDArray[np.float32]) -> dict[str, NDArray[np.float32]]:
        return after_step(
            tuned,
            slopes,
            self.learning_rate / self.num_directions_per_step,
            [self.seeds(round_number, k) for k in range(len(slopes))],
        )


def _errors(updates: Sequence[Update], slopes: NDArray[np.float32], combine: Combine) -> NDArray[np.float64]:
    """e_k, (K,)."""
    squares = [
        Update(device=one.device, arrays={SLOPES: np.square(one.arrays[SLOPES] - slopes)}, weight=one.weight)
        for one in updates
    ]
    spread = mean_of(squares, combine, [SLOPES])[SLOPES].astype(np.float64)
    return np.sqrt(np.maximum(spread, 0) / (len(updates) - 1))


def after_step(
    tuned: Arrays, slopes: NDArray[np.float32], learning_rate: float, seeds: Sequence[int]
) -> dict[str, NDArray[np.float32]]:
    """theta - lr sum_k G_k z_k, the same bits on every device."""
    return moved(tuned, seeds, [-learning_rate * float(slope) for slope in slopes])


def measure_slopes(job: Job) -> Done:
    """The device's half: catch up with the steps of the rounds behind, then measure K slopes on own texts."""
    settings = job.settings
    learning_rate = float(settings["learning_rate"]) / int(settings["num_directions_per_step"])

    def after(tuned: Arrays, number: int, slopes: NDArray[np.float32]) -> dict[str, NDArray[np.float32]]:
        return after_step(tuned, slopes, learning_rate, [job.seeds(number, k) for k in range(len(slopes))])

    return slopes_from(job, caught_up(job, str(settings["tuned"]), after))


def slopes_from(job: Job, adapter: Arrays) -> Done:
    """Measure K slopes on own texts, from this adapter on."""
    settings = job.settings
    num, per_step = int(settings["num_directions"]), int(settings["num_directions_per_step"])
    learning_rate = float(settings["learning_rate"]) / per_step
    tuned = names_like(adapter, str(settings["tuned"]))
    slopes = np.empty(num, np.float32)
    with job.model.walk(adapter, tuned, batch_size=int(settings["batch_size"]), seed=job.batch_seed) as walk:
        for first in range(0, num, per_step):
            if first:
                walk.next_batch()
            seeds = [job.seeds(job.round_number, k) for k in range(first, first + per_step)]
            measured = [walk.slope(seed, float(settings["zo_eps"])) for seed in seeds]
            slopes[first : first + per_step] = measured
            walk.move(seeds, [-learning_rate * float(slope) for slope in slopes[first : first + per_step]])
        return Done(arrays={SLOPES: slopes}, loss=walk.loss)

"""FedKSeed-Pro (Qin et al., arXiv 2312.06353): seeds whose slopes were large are drawn more often.

    amp_s = mean |clip(g)| over all slopes g that devices ever measured along z_s
    p = softmax((amp - min amp) / (max amp - min amp))
    on device c:  s ~ p,  all else as in `cotune.federation.fedkseed`

Symbols: clip to [-1000, 1000] as published. All seeds stay possible: the largest p is at most e times the smallest. A
seed that nobody drew counts as the mean of the others. The mean is over slopes and the dictionary holds only their
sums, so a device also sends sum |clip(g)| and the number of draws for each seed. That keeps single slopes to itself;
what it claims is bounded by its tau draws and by the clip.

Wire: 3 K float32 up, 2 K float32 down; whoever is new also gets w0 and the K seeds. Memory on the device: as FedKSeed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from cotune.federation.algorithm import Combine, Done, Job, Plan, Update
from cotune.federation.arrays import Arrays
from cotune.federation.fedkseed import CHANGE, SEEDS, FedKSeed, sums_by_seed, walk_along_drawn
from cotune.federation.number_ranges import check_positive

AMPLITUDES, DRAWS, PROBABILITIES = "amplitudes", "draws", "probabilities"


@dataclass(frozen=True, kw_only=True)
class FedKSeedPro:
    """The server half; `walk_the_weighted_pool` is the device's.

    A state is FedKSeed's with `amplitudes` and `draws`, (K,) each: sum |clip(g)| and the number of slopes so far.
    """

    pool: FedKSeed = field(default_factory=FedKSeed)
    max_slope: float = 1000.0
    """The clip of slopes, for the probabilities alone."""

    def __post_init__(self) -> None:
        check_positive(max_slope=self.max_slope)

    def start(self, adapter: Arrays) -> Arrays:
        nothing = np.zeros(self.pool.num_seeds, np.float32)
        return dict(self.pool.start(adapter)) | {AMPLITUDES: nothing, DRAWS: nothing.copy()}

    def plan(self, state: Arrays, round_number: int, device: str, since: int | None) -> Plan:
        pool = self.pool.plan(_without_history(state), round_number, device, since)
        amplitudes, draws = state[AMPLITUDES].astype(np.float64), state[DRAWS].astype(np.float64)
        return replace(
            pool,
            work="fedkseed_pro",
            arrays={**pool.arrays, PROBABILITIES: probabilities_of(amplitudes, draws).astype(np.float32)},
            settings={**pool.settings, "max_slope": self.max_slope},
            reply=dict.fromkeys((CHANGE, AMPLITUDES, DRAWS), (self.pool.num_seeds,)),
        )

    def merge(self, state: Arrays, round_number: int, updates: Sequence[Update], combine: Combine) -> Arrays:
        amplitudes, draws = state[AMPLITUDES].astype(np.float64), state[DRAWS].astype(np.float64)
        for one in updates:
            drawn = np.clip(one.arrays[DRAWS], 0, self.pool.num_steps).astype(np.float64)
            draws = draws + drawn
            amplitudes = amplitudes + np.clip(one.arrays[AMPLITUDES], 0, drawn * self.max_slope)
        merged = self.pool.merge(_without_history(state), round_number, updates, combine)
        return dict(merged) | {AMPLITUDES: amplitudes.astype(np.float32), DRAWS: draws.astype(np.float32)}

    def adapter(self, state: Arrays) -> dict[str, NDArray[np.float32]]:
        return self.pool.adapter(_without_history(state))


def probabilities_of(amplitudes: NDArray[np.float64], draws: NDArray[np.float64]) -> NDArray[np.float64]:
    """p, (K,).

    Args:
        amplitudes: sums of |clip(g)|, (K,).
        draws: how many slopes are in each, (K,).

    Example:
        >>> p = probabilities_of(np.array([2.0, 2.0, 0.0]), np.array([1.0, 2.0, 0.0]))  # means 2, 1 and, for none, 1.5
        >>> np.log(p / p[1]).round(9).tolist()
        [1.0, 0.0, 0.5]
    """
    seen = draws > 0
    if not seen.any():
        return np.full(len(draws), 1 / len(draws))
    means = np.divide(amplitudes, draws, out=np.zeros_like(amplitudes), where=seen)
    means = np.where(seen, means, means[seen].mean())
    width = means.max() - means.min()
    weights: NDArray[np.float64] = np.exp((means - means.min()) / width if width > 0 else np.zeros_like(means))
    probabilities: NDArray[np.float64] = weights / weights.sum()
    return probabilities


def walk_the_weighted_pool(job: Job) -> Done:
    """The device's half."""
    num_seeds, max_slope = len(job.arrays[SEEDS]), float(job.settings["max_slope"])
    sent = job.arrays[PROBABILITIES].astype(np.float64)
    # Rounded on the wire: numpy wants a sum of 1 in float64.
    drawn, slopes, loss = walk_along_drawn(job, sent / sent.sum())
    arrays = {
        CHANGE: sums_by_seed(drawn, slopes, num_seeds),
        AMPLITUDES: sums_by_seed(drawn, np.minimum(np.abs(slopes), max_slope), num_seeds),
        DRAWS: sums_by_seed(drawn, np.ones(len(drawn)), num_seeds),
    }
    return Done(arrays=arrays, loss=loss)


def _without_history(state: Arrays) -> Arrays:
    return {name: array for name, array in state.items() if name not in (AMPLITUDES, DRAWS)}

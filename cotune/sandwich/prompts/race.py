"""Racing: prompts that are clearly worse are asked no more, so that a large pool costs little more than a small one.

As CAPO does it (arXiv 2504.16005), after F-Race: examples come in blocks, each prompt still in the race is asked about
the same ones, and one leaves when k others beat it in a paired test, where k is how many shall be left at the end. The
race is run for the edge as it is then; a prompt that a trained edge would like may leave.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from cotune.errors import InputError

BlockLosses = Callable[[Sequence[str], slice], NDArray[np.float64]]
"""Losses of prompts on some of the examples: float64 (prompts, examples)."""


@dataclass(frozen=True, kw_only=True)
class RaceConfig:
    """When a prompt leaves."""

    num_left: int
    """k: prompts at the end, at most."""
    num_block_examples: int = 4
    """Examples between two looks."""
    alpha: float = 0.1
    """How often one pair may be told apart by chance; the tests are many, so this is no promise for the race."""

    def __post_init__(self) -> None:
        if self.num_left < 1 or self.num_block_examples < 2:
            raise InputError(
                f"num_left is {self.num_left} and num_block_examples {self.num_block_examples}, expected 1 and 2"
            )
        if not 0 < self.alpha < 0.5:
            raise InputError(f"alpha is {self.alpha}, expected a share above 0 and below 0.5, such as 0.1")


@dataclass(frozen=True)
class Race:
    """How a race ended.

    Attributes:
        left: prompts, in their old order.
        num_examples: that those were asked about.
        num_asked: pairs of prompt and example in all.
    """

    left: tuple[str, ...]
    num_examples: int
    num_asked: int


def race(prompts: Sequence[str], num_examples: int, losses: BlockLosses, config: RaceConfig) -> Race:
    """Race prompts until k are left or the examples are used up; then the k best by mean are left.

    Args:
        prompts: of the pool.
        num_examples: there are; asked about in order.
        losses: of a block.
        config: when a prompt leaves.

    Raises:
        BudgetError, WireError: from `losses`.

    Example:
        >>> table = {"good": 0.1, "bad": 0.9}
        >>> block = lambda them, part: np.array([[table[each]] * (part.stop - part.start) for each in them])
        >>> race(["bad", "good"], 20, block, RaceConfig(num_left=1))
        Race(left=('good',), num_examples=4, num_asked=8)
    """
    alive, seen, num_asked = list(range(len(prompts))), np.zeros((len(prompts), 0)), 0
    while len(alive) > config.num_left and seen.shape[1] < num_examples:
        part = slice(seen.shape[1], min(seen.shape[1] + config.num_block_examples, num_examples))
        block = np.full((len(prompts), part.stop - part.start), np.nan)
        block[alive] = losses([prompts[index] for index in alive], part)
        num_asked += len(alive) * block.shape[1]
        seen = np.hstack([seen, block])
        alive = _survivors(alive, seen, config)
    if len(alive) > config.num_left:
        alive = sorted(sorted(alive, key=lambda index: float(seen[index].mean()))[: config.num_left])
    return Race(tuple(prompts[index] for index in alive), seen.shape[1], num_asked)


def _survivors(alive: Sequence[int], seen: NDArray[np.float64], config: RaceConfig) -> list[int]:
    """Those that fewer than k others beat; never fewer than k."""
    left = [one for one in alive if sum(_beats(seen[other], seen[one], config) for other in alive) < config.num_left]
    if len(left) >= config.num_left:
        return left
    best = sorted(alive, key=lambda index: float(seen[index].mean()))[: config.num_left]
    return sorted({*left, *best})


def _beats(ours: NDArray[np.float64], theirs: NDArray[np.float64], config: RaceConfig) -> bool:
    differences = theirs - ours
    error = float(differences.std(ddof=1)) / math.sqrt(len(differences)) if len(differences) > 1 else math.inf
    return float(differences.mean()) > NormalDist().inv_cdf(1 - config.alpha) * error

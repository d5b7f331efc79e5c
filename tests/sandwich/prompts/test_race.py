"""Races: who leaves, when, and what it costs."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from cotune.errors import InputError
from cotune.sandwich.prompts.race import RaceConfig, race

NAMES = [f"p{index}" for index in range(6)]
# On paper: p0 and p3 lose 0.2, the others 0.8; noise that all share cancels in pairs.
MEANS = np.array([0.2, 0.8, 0.8, 0.2, 0.8, 0.8])


def losses(prompts: Sequence[str], part: slice) -> np.ndarray:
    draws = np.random.default_rng(0).normal(size=(len(NAMES), 40)) / 50
    shared = np.random.default_rng(1).normal(size=40) / 4
    rows = [NAMES.index(prompt) for prompt in prompts]
    return (MEANS[:, None] + draws + shared)[rows, part]


def test_clearly_worse_prompts_leave_after_the_first_block() -> None:
    found = race(NAMES, 40, losses, RaceConfig(num_left=2))
    assert (found.left, found.num_examples, found.num_asked) == (("p0", "p3"), 4, 24)


def test_equals_race_to_the_end_and_the_best_by_mean_is_left() -> None:
    found = race(["p0", "p3"], 10, losses, RaceConfig(num_left=1, alpha=1e-9))
    means = losses(["p0", "p3"], slice(0, 10)).mean(1)
    assert found.left == (("p0", "p3")[int(np.argmin(means))],)
    assert (found.num_examples, found.num_asked) == (10, 20)


def test_exact_ties_stay_and_never_too_few_are_left() -> None:
    def same(prompts: Sequence[str], part: slice) -> np.ndarray:
        return np.ones((len(prompts), part.stop - part.start))

    assert race(NAMES, 6, same, RaceConfig(num_left=3)).left == ("p0", "p1", "p2")
    assert race(NAMES[:2], 6, same, RaceConfig(num_left=2)).num_asked == 0


@pytest.mark.parametrize("options", [{"num_left": 0}, {"num_left": 1, "num_block_examples": 1}])
def test_races_that_cannot_be_are_refused(options: dict[str, int]) -> None:
    with pytest.raises(InputError, match="num_left"):
        RaceConfig(**options)
    with pytest.raises(InputError, match="alpha"):
        RaceConfig(num_left=1, alpha=0.5)

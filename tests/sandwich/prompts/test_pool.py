"""The pool: its slopes against differences, its response, what it refuses."""

from __future__ import annotations

import numpy as np
import pytest

from cotune.errors import InputError
from cotune.sandwich.prompts.pool import MAX_PROMPTS, PromptPool, softmax

LOSSES = np.array([0.2, 0.9, 0.4])


def test_the_slope_is_that_of_the_mixtures_loss() -> None:
    pool, y = PromptPool(["a", "b", "c"]), np.array([0.3, -1.0, 0.5])
    found = pool.slope(y, lambda prompts: LOSSES, step=0)
    for j in range(3):
        moved = np.eye(3)[j] * 1e-6
        difference = softmax(y + moved) @ LOSSES - softmax(y - moved) @ LOSSES
        assert found[j] == pytest.approx(difference / 2e-6, abs=1e-8)


def test_it_responds_with_the_best_all_but_alone() -> None:
    pool = PromptPool(["a", "b", "c"])
    y = pool.respond(pool.start(), lambda prompts: LOSSES, step=0)
    assert pool.best(y) == "a" and pool.mixture(y, 0) == [("a", 1.0)]
    assert pool.mixture(pool.start(), 0) == [("a", 1 / 3), ("b", 1 / 3), ("c", 1 / 3)]
    assert pool.candidates(y) == ["a", "b", "c"]


@pytest.mark.parametrize("prompts", [[], ["a", "a"], [str(each) for each in range(MAX_PROMPTS + 1)]])
def test_pools_that_cannot_be_are_refused(prompts: list[str]) -> None:
    with pytest.raises(InputError):
        PromptPool(prompts)

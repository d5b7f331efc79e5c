"""CMA-ES as the response of a prompt of numbers: never worse than where it began, within its evaluations."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from cotune.errors import InputError
from cotune.sandwich.prompts.cma_response import CmaResponse
from cotune.sandwich.prompts.latent import LatentPrompt

INNER = LatentPrompt(lambda z: f"{z[0]:.2f} {z[1]:.2f}", dim=2)


@pytest.mark.filterwarnings("default")
def test_it_is_better_or_stays() -> None:
    pytest.importorskip("cma", reason="cma is not installed")
    seen: list[str] = []

    def losses(prompts: Sequence[str]) -> np.ndarray:
        seen.extend(prompts)
        return np.array([sum((float(word) - 1) ** 2 for word in prompt.split()) for prompt in prompts])

    searched = CmaResponse(INNER, spread=0.5, max_evaluations=60)
    y = searched.respond(searched.start(), losses, step=3)
    assert losses([searched.best(y)])[0] < 0.1 and len(seen) <= 62
    assert np.array_equal(y, searched.respond(searched.start(), losses, step=3))
    best = np.ones(2)
    assert np.array_equal(searched.respond(best, losses, step=0), best)


def test_all_else_is_that_of_the_inner_one() -> None:
    searched, z = CmaResponse(INNER, spread=0.5, max_evaluations=6), np.array([1.0, 2.0])
    assert searched.best(z) == INNER.best(z) and searched.candidates(z) == INNER.candidates(z)
    assert searched.mixture(z, 0) == INNER.mixture(z, 0) and np.array_equal(searched.start(), INNER.start())
    same = [one.slope(z, lambda them: np.array([float(them[0].split()[0])]), 5) for one in (searched, INNER)]
    assert np.array_equal(*same)


@pytest.mark.parametrize("options", [{"spread": 0.0, "max_evaluations": 1}, {"spread": 1.0, "max_evaluations": 0}])
def test_what_cannot_be_is_refused(options: dict[str, float]) -> None:
    with pytest.raises(InputError, match="max_evaluations"):
        CmaResponse(INNER, **options)  # type: ignore[arg-type]

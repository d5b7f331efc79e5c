"""CMA-ES: finds a minimum, keeps to its evaluations, ends with a budget. Skipped without the package cma."""

from __future__ import annotations

import sys

import numpy as np
import pytest

from cotune.errors import BudgetError, InputError
from cotune.sandwich.prompts.cma_search import cma_search

TARGET = np.array([1.0, -2.0, 0.5])


def test_without_the_package_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cma", None)
    with pytest.raises(InputError, match=r"cotune\[cma\]"):
        cma_search(lambda z: 0.0, TARGET, spread=1.0, max_evaluations=1, seed=0)


@pytest.mark.filterwarnings("default")
def test_it_finds_the_minimum_within_its_evaluations_and_by_its_seed() -> None:
    pytest.importorskip("cma", reason="cma is not installed")
    runs = []
    for _ in range(2):
        seen: list[np.ndarray] = []

        def loss(z: np.ndarray, seen: list[np.ndarray] = seen) -> float:
            seen.append(z)
            return float(((z - TARGET) ** 2).sum())

        runs.append(cma_search(loss, np.zeros(3), spread=1.0, max_evaluations=301, seed=0))
        assert len(seen) == runs[-1].num_evaluations <= 301
    assert runs[0].loss < 1e-3 and runs[0].z == pytest.approx(TARGET, abs=0.05)
    assert runs[0].loss == runs[1].loss


@pytest.mark.filterwarnings("default")
def test_a_budget_that_ends_keeps_the_best() -> None:
    pytest.importorskip("cma", reason="cma is not installed")
    left = [5]

    def loss(z: np.ndarray) -> float:
        left[0] -= 1
        if left[0] < 0:
            raise BudgetError("over")
        return float(z @ z)

    assert cma_search(loss, TARGET, spread=1.0, max_evaluations=100, seed=0).num_evaluations == 5
    with pytest.raises(BudgetError):
        cma_search(loss, TARGET, spread=1.0, max_evaluations=100, seed=0)


@pytest.mark.parametrize("options", [{"spread": 0.0}, {"max_evaluations": 0}, {"start": np.zeros(1)}])
def test_what_cannot_be_is_refused(options: dict[str, object]) -> None:
    pytest.importorskip("cma", reason="cma is not installed")
    with pytest.raises(InputError, match="at least 2"):
        cma_search(lambda z: 0.0, **{"start": TARGET, "spread": 1.0, "max_evaluations": 1, "seed": 0, **options})  # type: ignore[arg-type]

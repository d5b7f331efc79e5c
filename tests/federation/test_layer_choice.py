from __future__ import annotations

from itertools import product
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from cotune.errors import InputError
from cotune.federation import layer_choice
from cotune.federation.layer_choice import (
    choose_layers,
    cover_layers,
    objective,
    shares_of_devices,
)


def best_of_all(values: NDArray[np.float64], costs: list[int], budgets: list[int], agreement: float) -> float:
    """The largest objective over every choice of three devices within their budgets."""
    masks = np.array(list(product((0, 1), repeat=len(costs))))
    first, second, third = (masks[masks @ costs <= budget] for budget in budgets)

    def apart(one: NDArray[np.int64], other: NDArray[np.int64]) -> NDArray[np.float64]:
        return agreement * np.abs(one[:, None] - other).sum(axis=2)

    totals = (first @ values[0])[:, None, None] + (second @ values[1])[:, None] + third @ values[2]
    totals -= apart(first, second)[:, :, None] + apart(first, third)[:, None] + apart(second, third)
    return float(totals.max())


def random_problem(seed: int, *, one_size: bool) -> tuple[NDArray[np.float64], list[int], list[int]]:
    """Three devices and four layers."""
    rng = np.random.default_rng(seed)
    costs = [2] * 4 if one_size else rng.integers(1, 6, 4).tolist()
    budgets = rng.integers(0, sum(costs) + 1, 3).tolist()
    return rng.exponential(size=(3, 4)), costs, budgets


def written_out(values: NDArray[np.float64], masks: NDArray[np.bool_], agreement: float) -> float:
    """The formula of the paper, word for word."""
    gains = sum(float(v @ m) for v, m in zip(values, masks, strict=True))
    return gains - agreement / 2 * sum(int(np.abs(m.astype(int) - o).sum()) for m in masks for o in masks)


def test_the_objective_by_hand() -> None:
    """3 + 1 + 3 = 7; the masks differ in one layer, in both orders: 7 - 0.5 / 2 * 2."""
    values = np.array([[3.0, 1.0], [1.0, 3.0]])
    masks = np.array([[True, False], [True, True]])
    assert objective(values, masks, 0.5) == written_out(values, masks, 0.5) == 6.5


@pytest.mark.parametrize("one_size", [True, False])
def test_without_agreement_the_choice_is_the_best_of_all(one_size: bool) -> None:
    for seed in range(40):
        values, costs, budgets = random_problem(seed, one_size=one_size)
        choice = choose_layers(values, costs, budgets)
        best = best_of_all(values, costs, budgets, 0.0)
        assert choice.objective == pytest.approx(best)
        assert (choice.masks @ np.array(costs) <= budgets).all()


@pytest.mark.parametrize("agreement", [0.05, 0.3, 1.0, 20.0])
def test_with_agreement_the_choice_is_close_to_the_best_of_all(agreement: float) -> None:
    """Never above the best; exactly the best in nearly all, and never worse than each device for itself."""
    num_best, gaps = 0, []
    for seed in range(100):
        values, costs, budgets = random_problem(seed, one_size=seed % 2 == 0)
        choice = choose_layers(values, costs, budgets, agreement=agreement)
        best = best_of_all(values, costs, budgets, agreement)
        assert choice.objective == pytest.approx(written_out(values, choice.masks, agreement))
        assert choice.objective <= best + 1e-9
        assert choice.objective >= written_out(values, choose_layers(values, costs, budgets).masks, agreement) - 1e-9
        num_best += choice.objective >= best - 1e-9
        gaps.append(best - choice.objective)
    assert num_best >= 95
    assert float(np.mean(gaps)) < 0.05


@pytest.mark.parametrize("agreement", [0.05, 0.3, 1.0])
def test_no_device_can_better_the_choice_alone(agreement: float) -> None:
    for seed in range(25):
        rng = np.random.default_rng(seed)
        values, costs = rng.exponential(size=(6, 4)), rng.integers(1, 6, 4)
        budgets = rng.integers(0, int(costs.sum()) + 1, 6)
        choice = choose_layers(values, costs.tolist(), budgets.tolist(), agreement=agreement)
        for device, budget in enumerate(budgets):
            for bits in product((False, True), repeat=4):
                if np.dot(bits, costs) <= budget:
                    other = choice.masks.copy()
                    other[device] = bits
                    assert objective(values, other, agreement) <= choice.objective + 1e-9


def test_agreement_brings_devices_together() -> None:
    values = np.array([[9.0, 4.0, 1.0], [1.0, 4.0, 5.0]])
    assert choose_layers(values, [1] * 3, [1, 1]).layers_of(1) == (2,)
    together = choose_layers(values, [1] * 3, [1, 1], agreement=4.0)
    # Layer 0 for both: 9 + 1 = 10. Apart 9 + 5 - 2 * 4 = 6, layer 1 for both 8.
    assert [together.layers_of(device) for device in range(2)] == [(0,), (0,)]
    assert together.objective == 10.0


def test_a_knapsack_of_many_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    costs = rng.integers(10**6, 10**8, 40).tolist()
    values = rng.exponential(size=(1, 40))
    budget = sum(costs) // 2
    choice = choose_layers(values, costs, [budget])
    spent = int(choice.masks[0] @ np.array(costs))
    assert spent <= budget
    # No layer in its place, and no swap of two, is better.
    for out in (None, *np.flatnonzero(choice.masks[0])):
        for new in np.flatnonzero(~choice.masks[0]):
            freed, lost = (0, 0.0) if out is None else (costs[out], values[0, out])
            assert spent - freed + costs[new] > budget or values[0, new] <= lost
    monkeypatch.setattr(layer_choice, "MAX_SETS", 50)
    with pytest.raises(InputError, match="costs has 40 different sizes, and more than 50 sets"):
        choose_layers(values, costs, [budget])


@given(
    budgets=st.lists(st.integers(0, 4), min_size=1, max_size=5),
    num_layers=st.integers(1, 4),
    min_cover=st.integers(0, 3),
    seed=st.integers(0, 1000),
)
@settings(max_examples=100, deadline=None)
def test_every_cover_that_budgets_allow_is_reached(
    budgets: list[int], num_layers: int, min_cover: int, seed: int
) -> None:
    """Layers of one size: reached exactly where any choice within the budgets has it."""
    min_cover = min(min_cover, len(budgets))
    values = np.random.default_rng(seed).exponential(size=(len(budgets), num_layers))
    choice = choose_layers(values, [1] * num_layers, budgets, min_cover=min_cover)
    assert (choice.masks.sum(axis=1) <= budgets).all()
    reached = int(np.minimum(choice.cover, min_cover).sum())
    # Gale and Ryser: q devices on each of t layers need at least q t places in devices of at most t.
    possible = all(sum(min(budget, t) for budget in budgets) >= min_cover * t for t in range(1, num_layers + 1))
    assert (reached == min_cover * num_layers) == possible


def test_a_chain_of_swaps() -> None:
    """Only device 0 can hold layer 0, and it must give up layer 1, which only device 1 can take, for layer 2."""
    values = np.array([[0.0, 9.0, 0.0], [0.0, 1.0, 9.0], [0.0, 0.0, 9.0]])
    masks = np.array([[False, True, False], [False, False, True], [False, False, True]])
    done = cover_layers(values, [3, 2, 1], [3, 2, 1], masks, min_cover=1)
    assert done.tolist() == [[True, False, False], [False, True, False], [False, False, True]]
    assert masks[0, 1]  # the old ones are as before


def test_the_repair_takes_the_least_loss() -> None:
    values = np.array([[9.0, 1.0], [9.0, 8.0], [9.0, 2.0]])
    choice = choose_layers(values, [1, 1], [1, 1, 1], min_cover=1)
    assert [choice.layers_of(device) for device in range(3)] == [(0,), (1,), (0,)]
    assert choice.cover.tolist() == [2, 1]


def test_values_of_devices_in_proportion() -> None:
    assert shares_of_devices(np.array([[1.0, 3.0], [0.0, 0.0]])).tolist() == [[0.25, 0.75], [0.5, 0.5]]


ONE = np.ones((2, 3))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: choose_layers(ONE[0], [1] * 3, [1]), r"values have shape \(3,\)"),
        (lambda: choose_layers(-ONE, [1] * 3, [1, 1]), "negative, nan or inf"),
        (lambda: choose_layers(ONE * np.nan, [1] * 3, [1, 1]), "negative, nan or inf"),
        (lambda: choose_layers(ONE, [1] * 2, [1, 1]), r"shape \(2, 3\), expected \(2, 2\)"),
        (lambda: choose_layers(ONE, [1, 0, 1], [1, 1]), r"costs are \[1, 0, 1\]"),
        (lambda: choose_layers(ONE, [1] * 3, [1, -1]), r"budgets are \[1, -1\]"),
        (lambda: choose_layers(ONE, [1] * 3, [1, 1], agreement=-1.0), r"agreement is -1\.0"),
        (lambda: choose_layers(ONE, [1] * 3, [1, 1], min_cover=3), "min_cover is 3, expected 0 to 2"),
        (lambda: choose_layers(ONE, [1] * 3, []), r"budgets are \[\]"),
        (lambda: cover_layers(ONE, [1] * 3, [1, 1], ONE[:1] > 0, min_cover=1), r"masks have shape \(1, 3\)"),
    ],
)
def test_bad_input(call: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        call()

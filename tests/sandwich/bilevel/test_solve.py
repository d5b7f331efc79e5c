"""The solver on toys whose bilevel optimum is known: what cuts and a penalty reach, and what others miss.

Linear-quadratic: f = ||y - A x||^2 / 2, F = ||y - t||^2 / 2 + r ||x||^2 / 2. The best response is A x, so the bilevel
optimum is the ridge regression x = (A'A + r I)^-1 A't. F alone has its minimum at x = 0, y = t, which no response is.
Pool: three prompts whose lower losses cross as x changes; worked out by hand below.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest

from cotune.errors import BudgetError, InputError
from cotune.sandwich.bilevel.problem import Sloped, Vector
from cotune.sandwich.bilevel.solve import Refresh, SolveConfig, solve

DIM_X, DIM_Y, RIDGE = 6, 4, 0.1


@dataclass
class LinearQuadratic:
    """The toy, exact or with noisy gradients and gaps."""

    sigma: float = 0.0
    response_rate: float = 1.0
    matrix: Vector = field(default_factory=lambda: np.random.default_rng(0).normal(size=(DIM_Y, DIM_X)) / 2)
    target: Vector = field(default_factory=lambda: np.random.default_rng(1).normal(size=DIM_Y))
    calls_left: int = 10**9

    def _noise(self, shape: int, step: int, key: int) -> Vector:
        return self.sigma * np.random.default_rng((step, key)).normal(size=shape)

    def value_of(self, x: Vector, y: Vector) -> float:
        return float(((y - self.target) ** 2).sum() + RIDGE * (x**2).sum()) / 2

    def upper(self, x: Vector, y: Vector, step: int) -> Sloped:
        self.calls_left -= 1
        if self.calls_left < 0:
            raise BudgetError("no call is left")
        noise_x, noise_y = self._noise(DIM_X, step, 0), self._noise(DIM_Y, step, 1)
        return Sloped(self.value_of(x, y), RIDGE * x + noise_x, y - self.target + noise_y)

    def lower(self, x: Vector, y: Vector, step: int) -> Sloped:
        distance = y - self.matrix @ x
        noise_x, noise_y = self._noise(DIM_X, step, 2), self._noise(DIM_Y, step, 3)
        return Sloped(float(distance @ distance) / 2, -self.matrix.T @ distance + noise_x, distance + noise_y)

    def respond(self, x: Vector, y: Vector, step: int) -> Vector:
        return y - self.response_rate * self.lower(x, y, step).grad_y

    def gaps(self, x: Vector, y: Vector, response: Vector, step: int) -> Vector:
        gap = self.lower(x, y, 0).value - self.lower(x, response, 0).value
        return gap + self._noise(32, step, 4)

    def score(self, x: Vector, y: Vector) -> float:
        return self.value_of(x, y)

    def mixed(self, x: Vector, y: Vector, along: Vector, step: int) -> Vector:
        return -self.matrix.T @ along

    @property
    def optimum(self) -> Vector:
        gram = self.matrix.T @ self.matrix + RIDGE * np.eye(DIM_X)
        return np.linalg.solve(gram, self.matrix.T @ self.target)

    def bilevel_value(self, x: Vector) -> float:
        """F at the best response to x: what a choice of x is worth."""
        return self.value_of(x, self.matrix @ x)


CONFIG = SolveConfig(num_steps=500, x_rate=0.1, y_rate=0.1, tolerance=1e-3)


def excess(problem: LinearQuadratic, x: Vector) -> float:
    """Share of the way from nothing (x = 0) to the optimum that is still to go."""
    best, nothing = problem.bilevel_value(problem.optimum), problem.bilevel_value(np.zeros(DIM_X))
    return (problem.bilevel_value(x) - best) / (nothing - best)


@pytest.mark.parametrize(
    "changes",
    [
        {"constraint": "cut"},
        {"constraint": "cut", "form": "projection"},
        {"constraint": "penalty", "penalty": 20.0},
    ],
)
def test_the_bilevel_optimum_is_reached(changes: dict[str, Any]) -> None:
    problem = LinearQuadratic()
    found = solve(problem, np.zeros(DIM_X), np.zeros(DIM_Y), replace(CONFIG, **changes))
    assert excess(problem, found.x) < 0.05
    # Restored: the prompt is within the tolerance of its best response, whatever the planes delivered.
    distance = found.y - problem.matrix @ found.x
    assert found.is_feasible and float(distance @ distance) / 2 <= CONFIG.tolerance * 1.01
    assert not found.is_sequential and found.history[-1].coupling >= 0


def test_the_joint_problem_and_alternation_miss_it() -> None:
    problem = LinearQuadratic()
    joint = solve(problem, np.ones(DIM_X), np.zeros(DIM_Y), replace(CONFIG, constraint="none"))
    assert excess(problem, joint.x) > 0.95 and not joint.is_feasible
    x = np.ones(DIM_X)
    for step in range(300):  # each in turn on its own loss: x sees no reason to be anything
        y = problem.respond(x, np.zeros(DIM_Y), step)
        x = x - 0.5 * problem.upper(x, y, step).grad_x
    assert excess(problem, x) > 0.95


def test_noise_costs_little_in_the_value_form() -> None:
    problem = LinearQuadratic(sigma=0.02)
    found = solve(problem, np.zeros(DIM_X), np.zeros(DIM_Y), replace(CONFIG, tolerance=0.02))
    assert excess(problem, found.x) < 0.1 and found.is_feasible


def test_planes_alone_leave_a_gap_which_the_restoration_closes() -> None:
    seen: list[Refresh] = []
    problem = LinearQuadratic()
    solve(problem, np.zeros(DIM_X), np.zeros(DIM_Y), replace(CONFIG, num_steps=300), on_refresh=seen.append)
    before = next(each for each in seen if each.step == 300)
    assert before.gap > CONFIG.tolerance and not before.is_feasible
    assert seen[-1].is_feasible and seen[-1].step > 300


def test_a_restoration_that_takes_too_long_ends_at_the_response() -> None:
    changed = replace(CONFIG, num_steps=20, y_rate=1e-4, num_restore_steps=6)
    found = solve(LinearQuadratic(), np.zeros(DIM_X), np.ones(DIM_Y), changed)
    assert [each.step for each in found.history[-3:]] == [25, 26, 27]
    assert not found.history[-2].is_feasible and found.is_feasible and found.history[-1].gap == pytest.approx(0.0)


def test_a_wider_tolerance_costs_upper_loss_nothing_and_a_tight_one_is_kept() -> None:
    problem, values = LinearQuadratic(), []
    for tolerance in (1e-3, 0.1, 1.0):
        found = solve(problem, np.zeros(DIM_X), np.zeros(DIM_Y), replace(CONFIG, tolerance=tolerance))
        gap = found.y - problem.matrix @ found.x
        assert float(gap @ gap) / 2 <= tolerance * 1.01
        values.append(problem.value_of(found.x, found.y))
    assert values[0] > values[1] > values[2]


def test_a_budget_that_ends_keeps_what_there_is() -> None:
    problem = LinearQuadratic(calls_left=37)
    found = solve(problem, np.zeros(DIM_X), np.zeros(DIM_Y), CONFIG)
    assert found.reason == "budget" and len(found.history) == 8


def test_it_ends_when_nothing_gets_better() -> None:
    found = solve(LinearQuadratic(), np.zeros(DIM_X), np.zeros(DIM_Y), replace(CONFIG, tolerance=10.0, patience=3))
    assert found.reason in ("patience", "steps") and found.is_feasible


def test_the_same_seed_gives_the_same_numbers() -> None:
    runs = [solve(LinearQuadratic(sigma=0.1), np.zeros(DIM_X), np.zeros(DIM_Y), CONFIG) for _ in range(2)]
    assert np.array_equal(runs[0].x, runs[1].x) and runs[0].history == runs[1].history


def test_where_x_has_no_part_in_f_the_prompt_comes_first() -> None:
    problem = LinearQuadratic()
    problem.matrix = np.zeros((DIM_Y, DIM_X))
    found = solve(problem, np.ones(DIM_X), np.ones(DIM_Y), CONFIG)
    assert found.is_sequential and np.abs(found.y).max() < 1e-9 and np.abs(found.x).max() < 1e-2


def test_numbers_that_are_none_are_refused() -> None:
    problem = LinearQuadratic(sigma=float("nan"))
    with pytest.raises(InputError, match="nan or inf"):
        solve(problem, np.zeros(DIM_X), np.zeros(DIM_Y), CONFIG)


@pytest.mark.parametrize(
    "name", ["constraint", "form", "x_rule", "tolerance", "penalty", "num_steps", "refresh_every", "grow_every"]
)
def test_settings_that_cannot_be_are_refused(name: str) -> None:
    with pytest.raises(InputError, match=name):
        SolveConfig(**{name: -1})


@dataclass
class FixedLosses:
    """Options with fixed losses, of which y weighs some by its softmax; x has a part in all alike."""

    losses: list[float]

    def _sloped(self, x: Vector, y: Vector) -> Sloped:
        weights = np.exp(y) / np.exp(y).sum()
        losses = np.array(self.losses)
        value = float(weights @ losses)
        return Sloped(value * (1 + float(x[0])), np.array([value]), (1 + x[0]) * weights * (losses - value))

    def upper(self, x: Vector, y: Vector, step: int) -> Sloped:
        return self._sloped(x, y)

    def lower(self, x: Vector, y: Vector, step: int) -> Sloped:
        return self._sloped(x, y)

    def respond(self, x: Vector, y: Vector, step: int) -> Vector:
        return 12.0 * np.eye(len(self.losses))[int(np.argmin(self.losses))]

    def gaps(self, x: Vector, y: Vector, response: Vector, step: int) -> Vector:
        return np.full(4, self._sloped(x, y).value - self._sloped(x, response).value)

    def score(self, x: Vector, y: Vector) -> float:
        return self.losses[int(np.argmax(y))]


@pytest.mark.parametrize("constraint", ["none", "penalty", "cut"])
def test_y_may_grow_and_what_was_the_best_is_held_against_what_is_new(constraint: Any) -> None:
    problem, told = FixedLosses([0.9, 0.5, 0.4]), list[list[int]]()

    def grow(x: Vector, y: Vector, keep: Sequence[int]) -> list[int | None] | None:
        told.append(list(keep))
        assert len(y) == len(problem.losses)
        if len(told) > 1:
            return None
        problem.losses = [*problem.losses[1:], 0.1]
        return [1, 2, None]

    start = np.array([0.0, 0.0, 6.0])
    config = SolveConfig(
        constraint=constraint, num_steps=60, refresh_every=5, grow_every=3, tolerance=0.05, y_rate=1.0, x_rate=1e-3
    )
    found = solve(problem, np.zeros(1), start, config, grow=grow)
    # Looks at 0, 5, .. 55; before the 4th, 7th and 10th of them. The third place of three was the leader and stays.
    assert len(told) == config.num_growths == 3 and told[0] == [2] and found.y.shape == (3,)
    assert problem.losses == [0.5, 0.4, 0.1] and int(np.argmax(found.y)) == 2 and found.is_feasible


def test_a_best_of_before_is_no_longer_known_to_be_within_the_tolerance() -> None:
    problem = FixedLosses([0.5, 0.4])

    def grow(x: Vector, y: Vector, keep: Sequence[int]) -> list[int | None] | None:
        problem.losses = [0.5, 0.4, 0.1]
        problem.gaps = problem.raising  # type: ignore[method-assign, attr-defined]
        return [0, 1, None]

    def raising(*_: Any) -> Vector:
        raise BudgetError("no call is left")

    problem.raising = raising  # type: ignore[attr-defined]
    config = SolveConfig(num_steps=20, refresh_every=5, grow_every=1, tolerance=0.05)
    found = solve(problem, np.zeros(1), np.array([0.0, 12.0]), config, grow=grow)
    assert found.reason == "budget" and found.history[0].is_feasible and not found.is_feasible
    assert int(np.argmax(found.y)) == 1 and found.y.shape == (3,)

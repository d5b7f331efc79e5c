"""The primal-dual loop: gradient steps on F, pulled towards prompts that are best for themselves.

    none       x, y <- descent on F alone: the joint problem
    penalty    x, y <- descent on F + gamma h
    cut        x, y <- descent on F + sum_l lambda_l plane_l(x, y); a plane is added where h > tolerance

The value form of the constraint, h = f(x, y) - f(x, y^) with y^ about the best response, needs first slopes alone
(Danskin): a = grad_x f(x, y) - grad_x f(x, y^), b = grad_y f(x, y). The projection form of ADBO, h = ||y - phi(x)||^2
with one lower step phi = y - eta grad_y f taken as the response, needs a mixed second derivative:
a = 2 eta (d/dx grad_y f)^T (y - phi), b = 2 (y - phi).

Planes alone do not deliver h <= tolerance, so that at the end y is restored: x stays, y follows f, and where that takes
too long becomes y^. Where x is seen to have no part in f, the problem is solved in two halves, the prompt first.

y may change its places on the way, as where prompts join a pool and others leave it (`Grow`). Planes follow, with zero
slope along what is new; what was the best is held against the new y^ before anything counts as within the tolerance.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal, cast

import numpy as np

from cotune.errors import BudgetError, InputError
from cotune.sandwich.bilevel.planes import PlaneConfig, PlaneSet
from cotune.sandwich.bilevel.problem import BilevelProblem, ProjectedProblem, Vector
from cotune.sandwich.bilevel.step_rules import AdamRule, PlainRule, XRule, clipped

Constraint = Literal["none", "penalty", "cut"]
Grow = Callable[[Vector, Vector, Sequence[int]], Sequence[int | None] | None]
"""Changes what y stands for: told x, y and places that must stay; gives each new place's old one, None for a new one.

None instead of places: nothing changed.
"""
_ONE_SIDED = 1.64
_DAMPING = 0.2
_NO_COUPLING = 1e-9


@dataclass(frozen=True, kw_only=True)
class SolveConfig:
    """How to solve."""

    constraint: Constraint = "cut"
    """none, penalty or cut."""
    form: Literal["value", "projection"] = "value"
    """Of the constraint, for cut."""
    tolerance: float = 0.02
    """epsilon: how much worse than the best the prompt may be, in units of f (of ||y||^2 for the projection form)."""
    penalty: float = 1.0
    """gamma."""
    num_steps: int = 200
    """At most."""
    x_rate: float = 0.05
    """Length of a step of x; with x_rule adam, of each number."""
    y_rate: float = 0.1
    """Length of a step of y."""
    x_rule: Literal["plain", "adam"] = "plain"
    """adam for adapters."""
    max_norm: float = 10.0
    """That gradients are clipped to."""
    refresh_every: int = 5
    """Steps from one look at the constraint to the next."""
    planes: PlaneConfig = field(default_factory=PlaneConfig)
    """Of cut."""
    num_restore_steps: int = 40
    """At most, after the last step; not for none."""
    patience: int | None = None
    """Refreshes in a row without a better result after which it ends; None: never."""
    grow_every: int = 4
    """G: refreshes from one growth of y to the next, where it grows."""

    def __post_init__(self) -> None:
        if self.constraint not in ("none", "penalty", "cut"):
            raise InputError(f"constraint is {self.constraint!r}, expected none, penalty or cut")
        if self.form not in ("value", "projection"):
            raise InputError(f"form is {self.form!r}, expected value or projection")
        if self.x_rule not in ("plain", "adam"):
            raise InputError(f"x_rule is {self.x_rule!r}, expected plain or adam")
        for name in ("penalty", "x_rate", "y_rate", "max_norm"):
            if not 0 < getattr(self, name) < math.inf:
                raise InputError(f"{name} is {getattr(self, name)}, expected a positive number")
        if not 0 <= self.tolerance < math.inf:
            raise InputError(f"tolerance is {self.tolerance}, expected 0 or more")
        for name in ("num_steps", "num_restore_steps"):
            if getattr(self, name) < 0:
                raise InputError(f"{name} is {getattr(self, name)}, expected 0 or more")
        if self.refresh_every < 1 or (self.patience is not None and self.patience < 1):
            raise InputError("refresh_every and patience are counted in steps and refreshes, expected at least 1")
        if self.grow_every < 1:
            raise InputError(f"grow_every is {self.grow_every}, expected refreshes, at least 1")

    def make_rule(self) -> XRule:
        """A new rule of steps of x."""
        return AdamRule() if self.x_rule == "adam" else PlainRule()

    @property
    def num_growths(self) -> int:
        """How often y may grow."""
        return max(0, -(-self.num_steps // self.refresh_every) - 1) // self.grow_every


@dataclass(frozen=True, kw_only=True)
class Refresh:
    """A look at the constraint.

    Attributes:
        step: at which; counts on through the restoration.
        upper: F there, as measured for choosing.
        gap, standard_error, num_examples: h, how sure that mean is, and of how many examples.
        coupling: ||grad_x f(x, y) - grad_x f(x, y^)||; 0 where x has no part in how prompts compare.
        num_planes, total_dual: of cut.
        is_feasible: gap + 1.64 standard errors within the tolerance.
    """

    step: int
    upper: float
    gap: float
    standard_error: float
    num_examples: int
    coupling: float
    num_planes: int
    total_dual: float
    is_feasible: bool


@dataclass(frozen=True, kw_only=True)
class Solution:
    """What was found.

    Attributes:
        x, y: the best by F among those within the tolerance; without any, or with constraint none, the last.
        response: y^ at this x.
        history: of all looks.
        reason: why it ended: steps, patience or budget.
        is_feasible: whether (x, y) is within the tolerance, as measured.
        is_sequential: x was found to have no part in f, and the prompt was chosen first.
    """

    x: Vector
    y: Vector
    response: Vector
    history: tuple[Refresh, ...]
    reason: Literal["steps", "patience", "budget"]
    is_feasible: bool
    is_sequential: bool


def solve(
    problem: BilevelProblem,
    x: Vector,
    y: Vector,
    config: SolveConfig,
    *,
    on_refresh: Callable[[Refresh], None] = lambda _: None,
    grow: Grow | None = None,
) -> Solution:
    """Solve; a budget that ends is an end like any other, and nothing paid for is lost.

    Args:
        problem: F and f; for the projection form with its mixed derivative.
        x, y: where to begin; float64 (d_x,), (d_y,).
        config: how.
        on_refresh: told of each look at the constraint.
        grow: changes the places of y, each `grow_every` refreshes; what it raises ends the search as the problem's
            errors do.

    Raises:
        InputError: the problem's numbers are not finite.
        BudgetError: the budget ended before there was anything.
    """
    run = _Run(problem, np.array(x, np.float64), np.array(y, np.float64), config, on_refresh)
    reason: Literal["steps", "patience", "budget"] = "steps"
    try:
        for step in range(config.num_steps):
            if step % config.refresh_every == 0:
                if grow is not None and run.history and len(run.history) % config.grow_every == 0:
                    run.grow(grow)
                run.refresh(step)
                if config.patience is not None and run.num_stale > config.patience:
                    reason = "patience"
                    break
            run.step(step)
        run.finish(config.num_steps)
    except BudgetError:
        if not run.history:
            raise
        reason = "budget"
    return run.solution(reason)


class _Run:
    """The state of one solve."""

    def __init__(
        self,
        problem: BilevelProblem,
        x: Vector,
        y: Vector,
        config: SolveConfig,
        on_refresh: Callable[[Refresh], None],
    ) -> None:
        self.problem, self.x, self.y, self.config, self.on_refresh = problem, x, y, config, on_refresh
        self.response = y.copy()
        self.planes = PlaneSet(config.planes)
        self.rule = config.make_rule()
        self.history: list[Refresh] = []
        self.best: tuple[float, Vector, Vector, Vector] | None = None
        self.best_is_old = False  # measured against another pool
        self.num_stale = 0
        self.is_sequential = False

    def step(self, step: int) -> None:
        config, upper = self.config, self.problem.upper(self.x, self.y, step)
        _check(upper.value, upper.grad_x, upper.grad_y)
        grad_x, grad_y, damping = upper.grad_x, upper.grad_y, 1.0
        if self.is_sequential:
            grad_y = np.zeros_like(grad_y)
        elif config.constraint == "cut":
            pull_x, pull_y = self.planes.pull(self.x, self.y)
            grad_x, grad_y = grad_x + pull_x, grad_y + pull_y
            damping = 1 + _DAMPING * self.planes.total_dual
        elif config.constraint == "penalty":
            # At every step: against an old response, h has no lower bound in x.
            self.response = self.problem.respond(self.x, self.response, step)
            damping = 1 + _DAMPING * config.penalty
            here, there = self.lower_pair(step)
            grad_x = grad_x + config.penalty * (here[0] - there)
            grad_y = grad_y + config.penalty * here[1]
        self.x = self.rule.step(self.x, clipped(grad_x, config.max_norm), config.x_rate / damping)
        self.y = self.y - config.y_rate / damping * clipped(grad_y, config.max_norm)
        if config.constraint == "cut":
            self.planes.ascend(self.x, self.y)

    def lower_pair(self, step: int) -> tuple[tuple[Vector, Vector], Vector]:
        """Slopes of f at (x, y), and along x at (x, y^), on one batch."""
        here = self.problem.lower(self.x, self.y, step)
        there = self.problem.lower(self.x, self.response, step)
        _check(here.value, here.grad_x, here.grad_y)
        return (here.grad_x, here.grad_y), there.grad_x

    def refresh(self, step: int) -> None:
        """Look at the constraint, cut if it is violated, and remember the point if it is good."""
        config = self.config
        self.planes.drop_idle()
        self.response = self.problem.respond(self.x, self.response, step)
        gaps = self.problem.gaps(self.x, self.y, self.response, step)
        (here_x, here_y), there_x = self.lower_pair(step)
        a = here_x - there_x
        gap, error = float(gaps.mean()), _standard_error(gaps)
        margin = one_sided_margin(gaps)
        if config.constraint == "cut" and not self.is_sequential:
            if config.form == "projection":
                self.cut_projection(step)
            elif gap > config.tolerance + margin:
                self.planes.cut(self.x, self.y, height=gap - config.tolerance - margin, a=a, b=here_y)
        coupling = float(np.linalg.norm(a))
        scale = float(np.linalg.norm(here_x)) + float(np.linalg.norm(here_y)) + 1.0
        seen = Refresh(
            step=step,
            upper=self.problem.score(self.x, self.y),
            gap=gap,
            standard_error=error,
            num_examples=len(gaps),
            coupling=coupling,
            num_planes=len(self.planes.planes),
            total_dual=self.planes.total_dual,
            is_feasible=gap + margin <= config.tolerance,
        )
        self.history.append(seen)
        self.on_refresh(seen)
        self.remember(seen)
        if config.constraint != "none" and gap > config.tolerance + margin and coupling <= _NO_COUPLING * scale:
            self.is_sequential = True
            self.y = self.response.copy()

    def grow(self, grow: Grow) -> None:
        """Let y change its places; a new one begins as heavy as the heaviest, so that slopes see it."""
        kept = {int(np.argmax(self.y))} | ({int(np.argmax(self.best[2]))} if self.best else set())
        places = grow(self.x, self.y, sorted(kept))
        if places is None:
            return
        self.planes.follow(places, self.y)
        if self.best is not None:
            upper, x, y, response = self.best
            self.best = upper, x, _moved(y, places, float(y.min())), _moved(response, places, float(response.min()))
            self.best_is_old = True
        self.response = _moved(self.response, places, float(self.response.min()))
        self.y = _moved(self.y, places, float(self.y.max()))

    def cut_projection(self, step: int) -> None:
        """ADBO's plane, of ||y - phi||^2 with one lower step from here."""
        problem = cast(ProjectedProblem, self.problem)
        eta = problem.response_rate
        distance = eta * problem.lower(self.x, self.y, step).grad_y  # y - phi
        h = float(distance @ distance)
        if h > self.config.tolerance:
            a = 2 * eta * problem.mixed(self.x, self.y, distance, step)
            self.planes.cut(self.x, self.y, height=h - self.config.tolerance, a=a, b=2 * distance)

    def remember(self, seen: Refresh) -> None:
        counts = seen.is_feasible or self.config.constraint == "none"
        if counts and (self.best is None or self.best_is_old or seen.upper < self.best[0]):
            self.best = seen.upper, self.x.copy(), self.y.copy(), self.response.copy()
            self.best_is_old, self.num_stale = False, 0
        elif self.best is not None:
            self.num_stale += 1

    def finish(self, step: int) -> None:
        """Restore: x stays, y follows f until it is within the tolerance."""
        self.refresh(step)
        if self.config.constraint == "none":
            return
        for extra in range(1, self.config.num_restore_steps + 1):
            if self.history[-1].is_feasible:
                return
            lower = self.problem.lower(self.x, self.y, step + extra)
            self.y = self.y - self.config.y_rate * clipped(lower.grad_y, self.config.max_norm)
            if extra % self.config.refresh_every == 0 or extra == self.config.num_restore_steps:
                self.refresh(step + extra)
        if self.config.num_restore_steps and not self.history[-1].is_feasible:
            # Flat places, such as between prompts of nearly one loss, take more steps than there are: go there at once.
            self.y = self.response.copy()
            self.refresh(step + self.config.num_restore_steps + 1)

    def solution(self, reason: Literal["steps", "patience", "budget"]) -> Solution:
        x, y, response = self.x, self.y, self.response
        if self.best is not None and self.config.constraint != "none":
            _, x, y, response = self.best
        has_best = self.best is not None and not self.best_is_old
        is_feasible = has_best if self.config.constraint != "none" else self.history[-1].is_feasible
        return Solution(
            x=x,
            y=y,
            response=response,
            history=tuple(self.history),
            reason=reason,
            is_feasible=is_feasible,
            is_sequential=self.is_sequential,
        )


def _moved(y: Vector, places: Sequence[int | None], start: float) -> Vector:
    """y at its new places; `start` at those that are new."""
    return np.array([start if place is None else y[place] for place in places])


def one_sided_margin(values: Vector) -> float:
    """How much lower their true mean may well be: 1.64 standard errors, one chance in 20."""
    return _ONE_SIDED * _standard_error(values)


def _standard_error(values: Vector) -> float:
    return float(values.std(ddof=1)) / math.sqrt(len(values)) if len(values) > 1 else 0.0


def _check(value: float, *gradients: Vector) -> None:
    if not (math.isfinite(value) and all(np.isfinite(gradient).all() for gradient in gradients)):
        raise InputError("a loss or a gradient is nan or inf; lower x_rate or y_rate, or look at the data")

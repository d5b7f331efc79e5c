"""The bilevel solver where the answer is known: forms of the constraint, noise, both epsilons, how well it responds.

    f = ||y - A x||^2 / 2        F = ||y - t||^2 / 2 + r ||x||^2 / 2        seen through noise, by differences alone

The best response is y = A x, so the optimum is a ridge regression. F alone has its minimum at x = 0, y = t, which no
response is. What counts is F at the best response to the x that was found, as a share of the way from x = 0 to the
optimum that is still to go: 0 is the optimum, 1 is as good as nothing. It needs no model and no cloud.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from statistics import median
from typing import Any, Literal

import numpy as np
from cells import OutOfTimeError, Value
from page import Page, about_run
from result_folder import Point, grid, plot_lines
from study_options import add_run_options, at_least_one, open_cells, plain_endings, results_of, study_parser

from cotune.evaluation.markup import Html
from cotune.evaluation.report import Section
from cotune.sandwich.bilevel.problem import Sloped, Vector
from cotune.sandwich.bilevel.slopes import estimate_mixed, estimate_slope
from cotune.sandwich.bilevel.solve import Constraint, SolveConfig, solve

NAME = "zocp_toys"
PROTOCOL = 1
DIM_X, DIM_Y, RIDGE = 20, 10, 0.1
NUM_GAPS = 32
EXPECTED = {
    "design study": "of a start of 8: cuts, value form 0.17, with noise 0.23; F alone 10; penalty 0.07",
    "paper": "cuts with first-order Taylor; no table of epsilon",
}


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One way to solve it.

    Attributes:
        constraint, form: of the solver.
        sigma: spread of one evaluation.
        radius: mu, of differences.
        tolerance: epsilon.
        penalty: gamma.
        low_steps: K, lower steps of a response.
        mixed: second derivatives of the projection form, exact or from differences.
        num_restore_steps: of y at the end.
    """

    constraint: Constraint = "cut"
    form: Literal["value", "projection"] = "value"
    sigma: float = 0.01
    radius: float = 0.2
    tolerance: float = 1e-3
    penalty: float = 20.0
    low_steps: int = 5
    mixed: Literal["exact", "differences"] = "exact"
    num_restore_steps: int = 40


class NoisyQuadratic:
    """The problem; fits `ProjectedProblem`. Noise is drawn anew for each evaluation, by the seed.

    Args:
        setting: noise, radius, lower steps.
        seed: of A, t and the noise.
        num_directions: of each slope.
    """

    response_rate = 0.5

    def __init__(self, setting: Setting, seed: int, num_directions: int) -> None:
        drawn = np.random.default_rng(seed)
        self.matrix = drawn.normal(size=(DIM_Y, DIM_X)) / np.sqrt(DIM_X)
        self.target = drawn.normal(size=DIM_Y)
        self.setting, self._directions = setting, num_directions
        self._noise = np.random.default_rng((seed, 1))
        self._draws = np.random.default_rng((seed, 2))

    def lower_value(self, x: Vector, y: Vector) -> float:
        """f, exact."""
        return float(((y - self.matrix @ x) ** 2).sum()) / 2

    def upper_value(self, x: Vector, y: Vector) -> float:
        """F, exact."""
        return float(((y - self.target) ** 2).sum() + RIDGE * (x**2).sum()) / 2

    def upper(self, x: Vector, y: Vector, step: int) -> Sloped:
        return self._sloped(self.upper_value, x, y)

    def lower(self, x: Vector, y: Vector, step: int) -> Sloped:
        return self._sloped(self.lower_value, x, y)

    def respond(self, x: Vector, y: Vector, step: int) -> Vector:
        for _ in range(self.setting.low_steps):
            y = y - self.response_rate * self._slope(lambda z: self.lower_value(x, z), y)
        return y

    def gaps(self, x: Vector, y: Vector, response: Vector, step: int) -> Vector:
        gap = self.lower_value(x, y) - self.lower_value(x, response)
        return gap + self.setting.sigma * self._noise.normal(size=NUM_GAPS)

    def score(self, x: Vector, y: Vector) -> float:
        return self.upper_value(x, y)

    def mixed(self, x: Vector, y: Vector, along: Vector, step: int) -> Vector:
        if self.setting.mixed == "exact":
            return -self.matrix.T @ along
        return estimate_mixed(
            lambda a, b: self._noisy(self.lower_value(a, b)),
            x,
            y,
            along,
            smoothing_radius=self.setting.radius,
            num_directions=self._directions,
            generator=self._draws,
        )

    def left(self, x: Vector) -> float:
        """Share of the way from x = 0 to the optimum that is still to go."""
        gram = self.matrix.T @ self.matrix + RIDGE * np.eye(DIM_X)
        best = self._worth(np.linalg.solve(gram, self.matrix.T @ self.target))
        return (self._worth(x) - best) / (self._worth(np.zeros(DIM_X)) - best)

    def _worth(self, x: Vector) -> float:
        return self.upper_value(x, self.matrix @ x)

    def _noisy(self, value: float) -> float:
        return value + self.setting.sigma * float(self._noise.normal())

    def _slope(self, value: Any, z: Vector) -> Vector:
        return estimate_slope(
            lambda at: self._noisy(value(at)),
            z,
            smoothing_radius=self.setting.radius,
            num_directions=self._directions,
            generator=self._draws,
        )

    def _sloped(self, value: Any, x: Vector, y: Vector) -> Sloped:
        along_x, along_y = self._slope(lambda z: value(z, y), x), self._slope(lambda z: value(x, z), y)
        return Sloped(self._noisy(value(x, y)), along_x, along_y)


BASE = Setting()
QUESTIONS: Mapping[str, tuple[str, Mapping[str, Setting]]] = {
    "forms": (
        "Which constraint comes close to the bilevel optimum?",
        {
            "F alone": replace(BASE, constraint="none"),
            "penalty 1": replace(BASE, constraint="penalty", penalty=1.0),
            "penalty 20": replace(BASE, constraint="penalty"),
            "cuts, value form": BASE,
            "cuts, projection form, exact second derivatives": replace(BASE, form="projection"),
            "cuts, projection form, differences": replace(BASE, form="projection", mixed="differences"),
            "cuts, value form, no noise": replace(BASE, sigma=0.0),
            "cuts, projection form, exact, no noise": replace(BASE, form="projection", sigma=0.0),
        },
    ),
    "radius": (
        "What does the smoothing radius do at the same noise?",
        {f"mu {mu:g}": replace(BASE, radius=mu) for mu in (1e-3, 1e-2, 0.05, 0.2, 1.0)},
    ),
    "tolerance": (
        "What does the tolerance cost?",
        {f"epsilon {e:g}": replace(BASE, tolerance=e) for e in (0.0, 0.005, 0.02, 0.05, 0.1, 0.3)},
    ),
    "response": (
        "How good must the response be? One lower step is the paper's first-order choice.",
        {f"{k} lower steps": replace(BASE, low_steps=k) for k in (1, 5, 20)},
    ),
    "restoration": (
        "Do the planes deliver the tolerance, and does the restoration?",
        {
            "planes alone": replace(BASE, num_restore_steps=0),
            "planes and restoration": BASE,
            "planes alone, no noise": replace(BASE, num_restore_steps=0, sigma=0.0),
            "planes and restoration, no noise": replace(BASE, sigma=0.0),
        },
    ),
}


def solve_once(setting: Setting, seed: int, *, num_steps: int, num_directions: int) -> Value:
    """One problem, one setting.

    Returns:
        `left`, see `NoisyQuadratic.left`; `gap`, h at the end, exact; `diverged`.
    """
    problem = NoisyQuadratic(setting, seed, num_directions)
    config = SolveConfig(
        constraint=setting.constraint,
        form=setting.form,
        tolerance=setting.tolerance,
        penalty=setting.penalty,
        num_steps=num_steps,
        num_restore_steps=setting.num_restore_steps,
        x_rate=0.05,
        y_rate=0.05,
    )
    found = solve(problem, np.zeros(DIM_X), np.zeros(DIM_Y), config)
    left = problem.left(found.x)
    return {"left": min(left, 1e6), "gap": min(problem.lower_value(found.x, found.y), 1e6), "diverged": left > 10.0}


def parser() -> argparse.ArgumentParser:
    """Of this command."""
    made = study_parser(NAME, __doc__, "examples:\n  python reproduce/zocp_toys.py\n", data="not read")
    made.set_defaults(model="linear-quadratic")
    made.add_argument("--what", nargs="+", choices=QUESTIONS, default=list(QUESTIONS), help="(default: all)")
    made.add_argument("--seeds", type=at_least_one, default=10, help="problems (default: %(default)s)")
    made.add_argument("--steps", type=at_least_one, default=400, help="of the solver (default: %(default)s)")
    made.add_argument("--directions", type=at_least_one, default=4, help="of one slope (default: %(default)s)")
    add_run_options(made, NAME)
    return made


def build(args: argparse.Namespace) -> Page:
    """Measure what is missing and show what there is."""
    cells, unfinished = open_cells(args), list[str]()
    sections, lines, measured = [], list[str](), dict[str, Any]()
    for what in args.what:
        question, settings = QUESTIONS[what]
        rows: dict[str, list[Value]] = {}
        for label, setting in settings.items():
            try:
                rows[label] = [_cell(cells, args, setting, seed) for seed in range(args.seeds)]
            except OutOfTimeError:
                unfinished.append(f"{what}, {label}")
        columns = {
            "still to go, median": [f"{_median(runs, 'left'):.3f}" for runs in rows.values()],
            "worst": [f"{max(run['left'] for run in runs):.3f}" for runs in rows.values()],
            "gap h, median": [f"{_median(runs, 'gap'):.2g}" for runs in rows.values()],
            "diverged": [f"{sum(run['diverged'] for run in runs)} of {len(runs)}" for runs in rows.values()],
        }
        content = grid(question, what, list(rows), columns)
        if what in ("radius", "tolerance"):
            content = Html(str(_plot(what, rows, settings)) + str(content))
        sections.append(Section(name=what, short=what, heading=question, content=content))
        measured[what] = {
            label: {"left": _median(runs, "left"), "gap": _median(runs, "gap")} for label, runs in rows.items()
        }
        lines += [
            f"{what:12s} {label:50s} {_median(runs, 'left'):.3f} to go, gap {_median(runs, 'gap'):.2g}"
            for label, runs in rows.items()
        ]
    return Page(
        title="The bilevel solver on a problem whose optimum is known",
        lead="0 is the bilevel optimum, 1 is as good as nothing.",
        expected=EXPECTED,
        measured=measured,
        sections=sections,
        deviations=[
            "One step length for all settings: differences between settings that both come close mean little.",
            "Every setting has as many steps, not evaluations: the projection form and K = 20 take more of them.",
        ],
        lines=lines,
        unfinished=unfinished,
    )


def _cell(cells: Any, args: argparse.Namespace, setting: Setting, seed: int) -> Value:
    key = {**asdict(setting), "seed": seed, "steps": args.steps, "directions": args.directions, "protocol": PROTOCOL}
    value: Value = cells.get(
        NAME,
        key,
        lambda: solve_once(setting, seed, num_steps=args.steps, num_directions=args.directions),
    )
    return value


def _median(runs: Sequence[Value], name: str) -> float:
    return float(median(run[name] for run in runs))


def _plot(what: str, rows: Mapping[str, Sequence[Value]], settings: Mapping[str, Setting]) -> Html:
    points: list[Point] = []
    for label, runs in rows.items():
        x = settings[label].radius if what == "radius" else settings[label].tolerance
        points.append((x, _median(runs, "left"), min(run["left"] for run in runs), max(run["left"] for run in runs)))
    return plot_lines(
        f"toy_{what}",
        "Median over problems, with the best and the worst.",
        {"cuts": points},
        x_label=what,
        y_label="still to go",
        is_log_x=what == "radius",
    )


def main() -> None:
    """Entry point."""
    args = parser().parse_args()
    about = about_run(vars(args), device="cpu", threads=1, backbone_parameters=DIM_X + DIM_Y)
    with plain_endings():
        build(args).publish(results_of(args, NAME), about=about)


if __name__ == "__main__":
    main()

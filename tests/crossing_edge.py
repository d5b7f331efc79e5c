"""The pool toy: two prompts whose lower losses cross as the edge's one number x changes.

    answer   f                     F
    B        0.2 + 0.2 x           0.1 + 0.1 (x - 2)^2
    A        0.4                   0.5 + 0.05 (x - 3)^2

Under B the final loss is least at x = 2; but B is the better prompt for itself only up to x = 1. So the bilevel optimum
is (x = 1, B) with F = 0.2, a little further with a tolerance. F alone leads to (2, B), which no prompt that answers for
itself stays at; alternating leads on to (3, A) with F = 0.5.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from redactors import redactor_here
from scripted_clouds import MemoryCloud

from cotune.errors import WireError
from cotune.evaluation import token_f1
from cotune.sandwich.account import Account
from cotune.sandwich.bilevel.problem import Vector
from cotune.sandwich.bilevel.solve import SolveConfig
from cotune.sandwich.budget import Budget
from cotune.sandwich.cloud_gate import CloudGate
from cotune.sandwich.examples import PrivateExample
from cotune.sandwich.fit import FitConfig, FitResult, fit
from cotune.sandwich.pipeline import Pipeline, PipelineConfig
from cotune.sandwich.prompts.pool import PromptPool
from cotune.sandwich.text_problem import Cell

PROMPTS = ["Prompt one.", "Prompt two."]
TRAIN = [PrivateExample(f"train {n} for Ann Lee", "f", ("Ann Lee",)) for n in range(8)]
VALIDATION = [PrivateExample(f"validate {n}", "F") for n in range(4)]
CONFIG = FitConfig(solve=SolveConfig(num_steps=300, x_rate=0.2, y_rate=0.5, tolerance=0.02))


class CrossingEdge:
    """The losses above; which of them by the target."""

    name = "crossing"

    def start(self) -> Vector:
        return np.zeros(1)

    def count_in(self, account: Account) -> None:
        account.num_edge_parameters = 1

    def losses(self, x: Vector, cells: Sequence[Cell]) -> Vector:
        return np.array([self._loss(float(x[0]), cell)[0] for cell in cells])

    def gradient(self, x: Vector, cells: Sequence[Cell], weights: Vector, step: int) -> tuple[Vector, Vector]:
        slopes = np.array([self._loss(float(x[0]), cell)[1] for cell in cells])
        return self.losses(x, cells), np.array([weights @ slopes])

    def write(self, x: Vector, jobs: Sequence[Any]) -> list[str]:
        return [job.answers[0] for job in jobs]

    def _loss(self, x: float, cell: Cell) -> tuple[float, float]:
        if cell.example.source.target == "f":
            return (0.2 + 0.2 * x, 0.2) if cell.answers == ("B",) else (0.4, 0.0)
        if cell.answers == ("B",):
            return 0.1 + 0.1 * (x - 2) ** 2, 0.2 * (x - 2)
        return 0.5 + 0.05 * (x - 3) ** 2, 0.1 * (x - 3)


def crossing_cloud(failures: Sequence[WireError] = ()) -> MemoryCloud:
    """Answers A under the first prompt and B under the second."""
    cloud = MemoryCloud()
    cloud.under = dict(zip(PROMPTS, "AB", strict=True))
    cloud.failures = list(failures)
    return cloud


def fit_crossing(cloud: MemoryCloud, folder: Path, budget: Budget | None = None, **options: Any) -> FitResult:
    """A fit of the toy."""
    with redactor_here() as redactor:
        pipeline = Pipeline(redactor, CloudGate(cloud), PipelineConfig(model="m", max_tokens=5))
        return fit(
            pipeline,
            TRAIN,
            VALIDATION,
            token_f1,
            **{
                "variable": PromptPool(PROMPTS),
                "edge": CrossingEdge(),
                "config": CONFIG,
                "budget": budget or Budget(),
                "folder": folder,
                **options,
            },
        )

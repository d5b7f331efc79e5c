"""CMA-ES over a few numbers, through the package `cma`: what black-box tuning is usually done with, for comparison.

It minimises any function of z within a number of evaluations, without a slope; there is no upper problem and no
constraint.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from cotune.errors import BudgetError, InputError
from cotune.sandwich.bilevel.problem import Vector


@dataclass(frozen=True, kw_only=True)
class CmaResult:
    """The best point that was seen.

    Attributes:
        z: it.
        loss: there, as measured.
        num_evaluations: how many were made.
    """

    z: Vector
    loss: float
    num_evaluations: int


def cma_search(
    loss: Callable[[Vector], float],
    start: Vector,
    *,
    spread: float,
    max_evaluations: int,
    seed: int,
    population: int | None = None,
) -> CmaResult:
    """Minimise `loss` from `start` on.

    Args:
        loss: of z; a `BudgetError` from it ends the search with what was seen.
        start: float64 (dim,), dim at least 2.
        spread: of the first generation around it.
        max_evaluations: never exceeded.
        seed: of the draws.
        population: points of a generation; None: cma's own choice for this dimension.

    Raises:
        InputError: `cma` is not installed, or a number cannot be.
        BudgetError: there was no room for one evaluation.

    Example:
        >>> cma_search(lambda z: float(z @ z), np.ones(2), spread=0.5, max_evaluations=200, seed=1).loss < 1e-3
        True
    """
    try:
        import cma
    except ImportError:
        raise InputError("CMA-ES needs the package cma; install it with: pip install 'cotune[cma]'") from None
    if len(start) < 2 or not spread > 0 or max_evaluations < 1:
        raise InputError(
            f"start has {len(start)} numbers, spread is {spread} and max_evaluations {max_evaluations}; expected at "
            "least 2 numbers, a positive spread and at least one evaluation"
        )
    # cma draws from the seed modulo 2^32, and takes 0 for the time of day.
    options = {"seed": seed + 1, "verbose": -9, **({} if population is None else {"popsize": population})}
    strategy = cma.CMAEvolutionStrategy(list(start), spread, options)
    best, best_loss, num_evaluations = np.array(start), np.inf, 0
    try:
        while num_evaluations < max_evaluations and not strategy.stop():
            points = strategy.ask()
            values = []
            for point in points[: max_evaluations - num_evaluations]:
                values.append(loss(np.asarray(point, np.float64)))
                num_evaluations += 1
                if values[-1] < best_loss:
                    best, best_loss = np.asarray(point, np.float64), values[-1]
            if len(values) < len(points):
                break
            strategy.tell(points, values)
    except BudgetError:
        if not np.isfinite(best_loss):
            raise
    return CmaResult(z=best, loss=float(best_loss), num_evaluations=num_evaluations)

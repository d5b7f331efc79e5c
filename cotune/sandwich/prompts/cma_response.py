"""Numbers behind a prompt, answered by CMA-ES instead of slopes: the comparison that black-box tuning is judged by."""

from __future__ import annotations

from cotune.errors import InputError
from cotune.sandwich.account import Account
from cotune.sandwich.bilevel.problem import Vector
from cotune.sandwich.prompts.cma_search import cma_search
from cotune.sandwich.prompts.latent import LatentPrompt
from cotune.sandwich.prompts.variable import PromptLosses


class CmaResponse:
    """A `PromptVariable` around a `LatentPrompt`, whose best response is searched for by CMA-ES.

    Args:
        inner: of at least 2 numbers.
        spread: of the first generation.
        max_evaluations: prompts of one response.
        seed: of the draws.

    Raises:
        InputError: no evaluation, or no spread.

    Example:
        >>> import numpy as np
        >>> inner = LatentPrompt(lambda z: f"{z.sum():.3f}", dim=2)
        >>> searched = CmaResponse(inner, spread=1.0, max_evaluations=100)
        >>> y = searched.respond(searched.start(), lambda them: np.array([abs(float(t) - 3) for t in them]), step=0)
        >>> abs(float(searched.best(y)) - 3) < 0.2
        True
    """

    def __init__(self, inner: LatentPrompt, *, spread: float, max_evaluations: int, seed: int = 0) -> None:
        if not spread > 0 or max_evaluations < 1:
            raise InputError(
                f"spread is {spread} and max_evaluations {max_evaluations}, expected a positive number and at least 1"
            )
        self._inner, self._spread, self._max_evaluations, self._seed = inner, spread, max_evaluations, seed

    def start(self) -> Vector:
        return self._inner.start()

    def mixture(self, y: Vector, step: int) -> list[tuple[str, float]]:
        return self._inner.mixture(y, step)

    def slope(self, y: Vector, losses: PromptLosses, step: int) -> Vector:
        return self._inner.slope(y, losses, step)

    def respond(self, y: Vector, losses: PromptLosses, step: int) -> Vector:
        """The best of `max_evaluations` prompts around y, y among them."""

        def loss(z: Vector) -> float:
            return float(losses([self._inner.best(z)])[0])

        here = loss(y)
        found = cma_search(loss, y, spread=self._spread, max_evaluations=self._max_evaluations, seed=self._seed + step)
        return found.z if found.loss < here else y

    def best(self, y: Vector) -> str:
        return self._inner.best(y)

    def candidates(self, y: Vector) -> list[str]:
        return self._inner.candidates(y)

    def count_in(self, account: Account) -> None:
        self._inner.count_in(account)

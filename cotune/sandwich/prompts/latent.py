"""An instruction that the edge's own model writes from a few numbers (InstructZero, arXiv 2306.03082, the idea).

    z, 10 to 50 numbers -> soft prefix A z of the edge model, A fixed and random -> it writes the instruction -> cloud

Text makes the loss a staircase in z: a smoothing radius smaller than a stair sees nothing. Slopes come from two points
in each of q directions, so that a step costs 2 q prompts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, runtime_checkable

import numpy as np

from cotune.errors import InputError
from cotune.sandwich.account import Account
from cotune.sandwich.bilevel.problem import Vector
from cotune.sandwich.bilevel.slopes import check_differences, estimate_slope
from cotune.sandwich.prompts.variable import PromptLosses


@runtime_checkable
class CountedWriter(Protocol):
    """A model that writes prompts from numbers, and whose work is counted."""

    def __call__(self, z: Vector) -> str:
        """The prompt of z."""
        ...

    def count_in(self, account: Account) -> None:
        """From now on, count tokens there."""
        ...


class LatentPrompt:
    """Numbers from which something writes a prompt.

    Args:
        write: from z, float64 (dim,), to the prompt; the same for the same z. `cotune.sandwich.prompts.soft_prefix`
            makes one of an edge model, whose operations are counted (`CountedWriter`).
        dim: of z.
        smoothing_radius: mu; large, since text is a staircase.
        num_directions: q.
        response_steps, response_rate: of the descent that stands for the best response.
        seed: of the directions.

    Raises:
        InputError: numbers that cannot be.

    Example:
        >>> prompt = LatentPrompt(lambda z: "Be brief." if z[0] > 0 else "Take your time.", dim=2)
        >>> prompt.best(np.array([0.3, 0.0]))
        'Be brief.'
    """

    def __init__(
        self,
        write: Callable[[Vector], str],
        *,
        dim: int,
        smoothing_radius: float = 0.5,
        num_directions: int = 4,
        response_steps: int = 5,
        response_rate: float = 0.5,
        seed: int = 0,
    ) -> None:
        check_differences(smoothing_radius, num_directions)
        if dim < 1 or response_steps < 1 or not response_rate > 0:
            raise InputError("dim, response_steps and response_rate are positive numbers, expected nothing else")
        self._write, self._dim, self._seed = write, dim, seed
        self._radius, self._num_directions = smoothing_radius, num_directions
        self._response_steps, self._response_rate = response_steps, response_rate

    def start(self) -> Vector:
        """The middle."""
        return np.zeros(self._dim)

    def mixture(self, y: Vector, step: int) -> list[tuple[str, float]]:
        """The one prompt of z."""
        return [(self._write(y), 1.0)]

    def slope(self, y: Vector, losses: PromptLosses, step: int) -> Vector:
        """From 2 q prompts."""
        return estimate_slope(
            lambda z: float(losses([self._write(z)])[0]),
            y,
            smoothing_radius=self._radius,
            num_directions=self._num_directions,
            generator=np.random.default_rng((self._seed, step)),
        )

    def respond(self, y: Vector, losses: PromptLosses, step: int) -> Vector:
        """The best of some steps down the slope, which may lead over an edge."""
        best, best_loss, z = y, float(losses([self._write(y)])[0]), y
        for inner in range(self._response_steps):
            z = z - self._response_rate * self.slope(z, losses, self._response_steps * step + inner)
            loss = float(losses([self._write(z)])[0])
            if loss < best_loss:
                best, best_loss = z, loss
        return best

    def best(self, y: Vector) -> str:
        """The one of z."""
        return self._write(y)

    def candidates(self, y: Vector) -> list[str]:
        """The one of z, and those a radius away along each axis, as far as they differ."""
        steps = [sign * self._radius * axis for axis in np.eye(self._dim) for sign in (1, -1)]
        return list(dict.fromkeys([self._write(y), *(self._write(y + step) for step in steps)]))

    def count_in(self, account: Account) -> None:
        """Count what the writer takes there, where it is a model."""
        if isinstance(self._write, CountedWriter):
            self._write.count_in(account)

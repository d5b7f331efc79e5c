"""What a prompt variable is: numbers y, the prompts that they stand for, and how the loss changes with them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from cotune.sandwich.account import Account
from cotune.sandwich.bilevel.problem import Vector

PromptLosses = Callable[[Sequence[str]], Vector]
"""The mean loss of each prompt on one batch, the same for all of them."""


class PromptVariable(Protocol):
    """One kind of prompt variable. What is drawn is drawn by the step's number."""

    def start(self) -> Vector:
        """y to begin with."""
        ...

    def mixture(self, y: Vector, step: int) -> list[tuple[str, float]]:
        """The prompts that y stands for, each once, with weights that add up to 1."""
        ...

    def slope(self, y: Vector, losses: PromptLosses, step: int) -> Vector:
        """The slope along y of the loss of what y stands for, exact or estimated."""
        ...

    def respond(self, y: Vector, losses: PromptLosses, step: int) -> Vector:
        """A better y for these losses: the best one, or some steps towards it."""
        ...

    def best(self, y: Vector) -> str:
        """The one prompt to ship."""
        ...

    def candidates(self, y: Vector) -> list[str]:
        """The prompts that a certificate compares, the shipped one among them."""
        ...

    def count_in(self, account: Account) -> None:
        """From now on, count there what a model of its own takes; nothing where it has none."""
        ...

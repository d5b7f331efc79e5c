"""A pool of prompts: the default, since it works with any chat API and its slopes are exact.

f(x, y) = sum_j p_j l_j(x)        p = softmax(y), l_j the loss of prompt j
df/dy_j = p_j (l_j - p . l)       h = p . l - min_j l_j
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from cotune.errors import InputError
from cotune.sandwich.account import Account
from cotune.sandwich.bilevel.problem import Vector
from cotune.sandwich.prompts.variable import PromptLosses

MAX_PROMPTS = 256
_SHARP = 12.0  # logit of a response: all others together weigh 1e-5 for a few prompts
_NOTHING = 1e-4


class PromptPool:
    """Logits over prompts.

    Args:
        prompts: texts; an empty one asks without a prompt.

    Raises:
        InputError: none, too many, or one twice.

    Example:
        >>> pool = PromptPool(["Be brief.", "Think first."])
        >>> y = pool.respond(pool.start(), lambda prompts: np.array([0.5, 0.2]), step=0)
        >>> pool.best(y)
        'Think first.'
    """

    def __init__(self, prompts: Sequence[str]) -> None:
        if not 1 <= len(prompts) <= MAX_PROMPTS:
            raise InputError(f"there are {len(prompts)} prompts, expected 1 to {MAX_PROMPTS}")
        if len(set(prompts)) != len(prompts):
            raise InputError("a prompt stands in the pool twice; leave one out")
        self.prompts = tuple(prompts)

    def start(self) -> Vector:
        """All alike."""
        return np.zeros(len(self.prompts))

    def mixture(self, y: Vector, step: int) -> list[tuple[str, float]]:
        """Prompts by softmax(y), without those that hardly weigh."""
        weights = softmax(y)
        weights[weights < _NOTHING] = 0.0
        weights /= weights.sum()
        return [(prompt, float(p)) for prompt, p in zip(self.prompts, weights, strict=True) if p]

    def slope(self, y: Vector, losses: PromptLosses, step: int) -> Vector:
        """p_j (l_j - p . l), exact."""
        weights, found = softmax(y), losses(self.prompts)
        return np.asarray(weights * (found - weights @ found))

    def respond(self, y: Vector, losses: PromptLosses, step: int) -> Vector:
        """The prompt with the smallest loss, all but alone."""
        sharp = np.zeros(len(self.prompts))
        sharp[int(np.argmin(losses(self.prompts)))] = _SHARP
        return sharp

    def best(self, y: Vector) -> str:
        """The heaviest."""
        return self.prompts[int(np.argmax(y))]

    def candidates(self, y: Vector) -> list[str]:
        """All of them."""
        return list(self.prompts)

    def count_in(self, account: Account) -> None:
        """No model writes these."""


def softmax(y: Vector) -> Vector:
    """Weights that add up to 1.

    Example:
        >>> softmax(np.zeros(4))
        array([0.25, 0.25, 0.25, 0.25])
    """
    raised = np.exp(y - y.max())
    return np.asarray(raised / raised.sum())

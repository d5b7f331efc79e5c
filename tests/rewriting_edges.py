"""An edge for tests that writes what it is told to, and whose one number moves along a slope of 1 where it learns."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from cotune.sandwich.bilevel.problem import Vector
from cotune.sandwich.rewrite_trials import Preference

GOOD_AND_BAD = ("Town?", "Weather?")


class Edge:
    """Draws a good question, a useless one, and an empty one; greedily it writes by x.

    Attributes:
        read: what it drew after.
        learnt: supervised texts of each step.
        pairs: those of the last step.
        references: what was read at which x for the reference.
        greedy: what it writes greedily, from its x.
    """

    def __init__(self, drawn: Sequence[str] = (*GOOD_AND_BAD, ""), greedy: Sequence[str] = ("", "Town?")) -> None:
        self.drawn, self.greedy = list(drawn), list(greedy)
        self.read, self.learnt = list[str](), list[list[tuple[str, str]]]()
        self.pairs, self.references = list[Preference](), list[tuple[float, int]]()

    def sample_after(self, x: Vector, prompts_as_text: Sequence[str], *, temperature: float, seed: int) -> list[str]:
        self.read += prompts_as_text
        return self.drawn[: len(prompts_as_text)]

    def write_after(self, x: Vector, prompts_as_text: Sequence[str]) -> list[str]:
        """The first of `greedy` until pairs were learnt from, then the second."""
        return [self.greedy[bool(self.pairs)]] * len(prompts_as_text)

    def gradient_after(
        self, x: Vector, pairs: Sequence[tuple[str, str]], weights: Vector, step: int
    ) -> tuple[Vector, Vector]:
        assert weights.sum() == pytest.approx(1)
        self.learnt.append(list(pairs))
        return np.zeros(len(pairs)), np.ones(1)

    def log_probs_after(self, x: Vector, pairs: Sequence[tuple[str, str]]) -> Vector:
        self.references.append((float(x[0]), len(pairs)))
        return np.array([-float(len(text)) for _, text in pairs])

    def preference_losses(
        self, x: Vector, preferences: Sequence[Preference], reference: Vector, *, beta: float
    ) -> Vector:
        self._check(preferences, reference)
        return np.full(len(preferences), 0.25)

    def preference_gradient(
        self, x: Vector, preferences: Sequence[Preference], reference: Vector, step: int, *, beta: float
    ) -> tuple[Vector, Vector]:
        self._check(preferences, reference)
        self.pairs = list(preferences)
        return np.full(len(preferences), 0.5), np.ones(1)

    def _check(self, preferences: Sequence[Preference], reference: Vector) -> None:
        assert reference.tolist() == [[-len(each.better), -len(each.worse)] for each in preferences]

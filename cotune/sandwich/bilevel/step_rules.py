"""How a slope becomes a step of x: plain, or Adam for adapters; and the clip before either."""

from __future__ import annotations

from typing import Protocol

import numpy as np

from cotune.sandwich.bilevel.problem import Vector

_BETAS = (0.9, 0.999)
_EPSILON = 1e-8


class XRule(Protocol):
    """A rule, which may remember."""

    def step(self, x: Vector, gradient: Vector, rate: float) -> Vector:
        """The next x."""
        ...


class PlainRule:
    """x - rate g.

    Example:
        >>> PlainRule().step(np.array([1.0]), np.array([2.0]), 0.1)
        array([0.8])
    """

    def step(self, x: Vector, gradient: Vector, rate: float) -> Vector:
        return x - rate * gradient


class AdamRule:
    """Kingma and Ba, arXiv 1412.6980; the first step has length `rate` in each number.

    Example:
        >>> AdamRule().step(np.array([1.0]), np.array([2.0]), 0.1).round(6)
        array([0.9])
    """

    def __init__(self) -> None:
        self._count, self._mean, self._square = 0, 0.0 * np.zeros(1), 0.0 * np.zeros(1)

    def step(self, x: Vector, gradient: Vector, rate: float) -> Vector:
        self._count += 1
        first, second = _BETAS
        self._mean = first * self._mean + (1 - first) * gradient
        self._square = second * self._square + (1 - second) * gradient**2
        mean, square = self._mean / (1 - first**self._count), self._square / (1 - second**self._count)
        return np.asarray(x - rate * mean / (np.sqrt(square) + _EPSILON))


def clipped(gradient: Vector, max_norm: float) -> Vector:
    """The gradient, shortened to that length where it is longer.

    Example:
        >>> clipped(np.array([3.0, 4.0]), 1.0)
        array([0.6, 0.8])
    """
    norm = float(np.linalg.norm(gradient))
    return gradient * (max_norm / norm) if norm > max_norm else gradient

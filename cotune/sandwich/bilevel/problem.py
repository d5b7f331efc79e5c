"""What the solver asks of a problem: values and slopes of the upper loss F and the lower loss f.

Whatever is drawn, a batch or a direction, is drawn by the number of the step that it is for, so that a run that goes on
asks the same again.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

Vector = NDArray[np.float64]


@dataclass(frozen=True)
class Sloped:
    """A loss and how it changes.

    Attributes:
        value: at (x, y).
        grad_x, grad_y: exact or estimated.
    """

    value: float
    grad_x: Vector
    grad_y: Vector


class BilevelProblem(Protocol):
    """F and f, perhaps noisy."""

    def upper(self, x: Vector, y: Vector, step: int) -> Sloped:
        """F."""
        ...

    def lower(self, x: Vector, y: Vector, step: int) -> Sloped:
        """f."""
        ...

    def respond(self, x: Vector, y: Vector, step: int) -> Vector:
        """A y that is about the best for f(x, .), found from `y` on."""
        ...

    def gaps(self, x: Vector, y: Vector, response: Vector, step: int) -> Vector:
        """f_i(x, y) - f_i(x, response) for each example i of a batch that nothing else of this step reads.

        Both losses of a pair see the same example and the same draws.
        """
        ...

    def score(self, x: Vector, y: Vector) -> float:
        """F for choosing between results: always on the same examples; lower is better."""
        ...


class ProjectedProblem(BilevelProblem, Protocol):
    """A problem whose lower descent can be differentiated: for the projection form of the constraint."""

    @property
    def response_rate(self) -> float:
        """eta, the length of a lower step."""
        ...

    def mixed(self, x: Vector, y: Vector, along: Vector, step: int) -> Vector:
        """The slope along x of (grad_y f . along): a mixed second derivative, exact or estimated."""
        ...

"""Cutting planes and their multipliers, after ADBO (Jiao et al., arXiv 2212.10048) and its zeroth-order kin.

    plane l    a_l . x + b_l . y + kappa_l <= 0        (a, b, kappa divided by ||(a, b)||)
    ascent     lambda_l <- clip(lambda_l + eta (a_l . x + b_l . y + kappa_l - c lambda_l), 0, lambda_max)

A plane cuts off the point at which it was made, and no more is promised: the planes are an outer set of what the
constraint allows, and dropping them gives up Kelley's argument. What delivers h <= tolerance is the restoration, and
what says so the certificate.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from cotune.errors import InputError
from cotune.sandwich.bilevel.problem import Vector


@dataclass(eq=False)
class Plane:
    """One plane, normalised.

    Attributes:
        a, b: slopes along x and y.
        kappa: its constant.
        dual: lambda.
        num_idle: refreshes in a row at which lambda was 0.
    """

    a: Vector
    b: Vector
    kappa: float
    dual: float = 0.0
    num_idle: int = 0

    def height(self, x: Vector, y: Vector) -> float:
        """Above 0 where it is violated."""
        return float(self.a @ x + self.b @ y) + self.kappa


@dataclass(frozen=True, kw_only=True)
class PlaneConfig:
    """How planes push."""

    dual_rate: float = 0.2
    """eta, of the ascent."""
    dual_decay: float = 0.01
    """c, which keeps multipliers from growing on noise."""
    max_dual: float = 20.0
    """lambda_max."""
    max_planes: int = 16
    """One more pushes out the one with the smallest multiplier."""
    patience: int = 2
    """Refreshes in a row without a push after which a plane is dropped."""

    def __post_init__(self) -> None:
        for name in ("dual_rate", "max_dual"):
            if not getattr(self, name) > 0:
                raise InputError(f"{name} is {getattr(self, name)}, expected a positive number")
        if not self.dual_decay >= 0:
            raise InputError(f"dual_decay is {self.dual_decay}, expected 0 or more")
        for name in ("max_planes", "patience"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name)}, expected at least 1")


@dataclass
class PlaneSet:
    """The planes of a run."""

    config: PlaneConfig
    planes: list[Plane] = field(default_factory=list)

    @property
    def total_dual(self) -> float:
        """Of all multipliers."""
        return sum(plane.dual for plane in self.planes)

    def cut(self, x: Vector, y: Vector, *, height: float, a: Vector, b: Vector) -> None:
        """Add the plane that says: the linearised constraint, `height` above its bound at (x, y), is at most 0.

        Slopes of no length say nothing, and no plane is made of them.
        """
        norm = float(np.sqrt(a @ a + b @ b))
        if not norm > 0:
            return
        if len(self.planes) >= self.config.max_planes:
            self.planes.remove(min(self.planes, key=lambda plane: plane.dual))
        kappa = (height - float(a @ x + b @ y)) / norm
        self.planes.append(Plane(a / norm, b / norm, kappa))

    def pull(self, x: Vector, y: Vector) -> tuple[Vector, Vector]:
        """What the planes add to the gradients: the sums of lambda_l a_l and lambda_l b_l."""
        pull_x, pull_y = np.zeros_like(x), np.zeros_like(y)
        for plane in self.planes:
            pull_x += plane.dual * plane.a
            pull_y += plane.dual * plane.b
        return pull_x, pull_y

    def ascend(self, x: Vector, y: Vector) -> None:
        """One step of all multipliers."""
        config = self.config
        for plane in self.planes:
            moved = plane.dual + config.dual_rate * (plane.height(x, y) - config.dual_decay * plane.dual)
            plane.dual = min(max(moved, 0.0), config.max_dual)

    def follow(self, places: Sequence[int | None], y: Vector) -> None:
        """Go over to a y with other places: zero for those that are new, and those that went stay as they were.

        A plane's height at the same point is the same before and after.

        Args:
            places: for each place of the new y its old one; None for a new one.
            y: the old one, float64 (d_y,), at whose values the places that went are held.

        Example:
            >>> planes = PlaneSet(PlaneConfig())
            >>> planes.cut(np.zeros(1), np.zeros(2), height=1.0, a=np.zeros(1), b=np.array([3.0, 4.0]))
            >>> planes.follow([1, None], np.array([2.0, 0.0]))
            >>> planes.planes[0].b.tolist(), round(planes.planes[0].kappa, 6)  # 0.2, and 0.6 times 2
            ([0.8, 0.0], 1.4)
        """
        kept = {place for place in places if place is not None}
        gone = [place for place in range(len(y)) if place not in kept]
        for plane in self.planes:
            plane.kappa += float(plane.b[gone] @ y[gone])
            plane.b = np.array([0.0 if place is None else plane.b[place] for place in places])

    def drop_idle(self) -> None:
        """At a refresh: drop those that have not pushed for long."""
        for plane in self.planes:
            plane.num_idle = plane.num_idle + 1 if plane.dual <= 0 else 0
        self.planes = [plane for plane in self.planes if plane.num_idle < self.config.patience]

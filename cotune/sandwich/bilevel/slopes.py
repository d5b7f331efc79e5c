"""Slopes of losses that can only be evaluated, from differences (Nesterov and Spokoiny, 2017; MeZO, arXiv 2305.17333).

    g = 1/q sum_j [f(z + mu u_j) - f(z - mu u_j)] / (2 mu) u_j        u_j ~ N(0, I)

mu is the smoothing radius. It is not the tolerance of a constraint, and has nothing to do with it: it must exceed what
noise and plateaus of the loss hide. Where sigma is the spread of one paired evaluation, the noise of g is
d sigma^2 / (2 q mu^2), so that a radius that is too small does more harm than one that is too large.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from cotune.errors import InputError
from cotune.sandwich.bilevel.problem import Vector

_NOISE_FACTOR = 20.0


def estimate_slope(
    f: Callable[[Vector], float],
    z: Vector,
    *,
    smoothing_radius: float,
    num_directions: int,
    generator: np.random.Generator,
) -> Vector:
    """The gradient of f at z, from 2 q evaluations.

    Args:
        f: sees the same batch and the same draws each time.
        z: float64 (dim,).
        smoothing_radius: mu.
        num_directions: q.
        generator: draws the directions.

    Raises:
        InputError: a radius or number that cannot be.

    Example:
        >>> f = lambda z: float(3 * z[0])
        >>> draws = np.random.default_rng(0)
        >>> estimate_slope(f, np.zeros(1), smoothing_radius=0.1, num_directions=500, generator=draws).round()
        array([3.])
    """
    check_differences(smoothing_radius, num_directions)
    total = np.zeros_like(z)
    for _ in range(num_directions):
        direction = generator.standard_normal(z.shape)
        rise = f(z + smoothing_radius * direction) - f(z - smoothing_radius * direction)
        total += rise / (2 * smoothing_radius) * direction
    return total / num_directions


def estimate_mixed(
    f: Callable[[Vector, Vector], float],
    x: Vector,
    y: Vector,
    along: Vector,
    *,
    smoothing_radius: float,
    num_directions: int,
    generator: np.random.Generator,
) -> Vector:
    """The slope along x of (grad_y f . along), from 4 q evaluations and no gradient.

        m = [f(x + mu w, y + mu u) - f(x + mu w, y - mu u) - f(x - mu w, y + mu u) + f(x - mu w, y - mu u)] / (4 mu^2)
        the mean of m (u . along) w

    Its noise grows with 1/mu^4 and d_x d_y: fine where f is exact, hopeless where it is not.
    """
    check_differences(smoothing_radius, num_directions)
    mu, total = smoothing_radius, np.zeros_like(x)
    for _ in range(num_directions):
        w, u = generator.standard_normal(x.shape), generator.standard_normal(y.shape)
        corners = (
            f(x + mu * w, y + mu * u)
            - f(x + mu * w, y - mu * u)
            - f(x - mu * w, y + mu * u)
            + f(x - mu * w, y - mu * u)
        )
        total += corners / (4 * mu**2) * float(u @ along) * w
    return total / num_directions


def least_radius(repeated: Vector, typical_slope: float) -> float:
    """The smallest radius whose differences stand out of the noise: 20 sigma / |slope|.

    Args:
        repeated: the same evaluation again and again, at least two; 8 are enough.
        typical_slope: how much the loss changes for a unit step.

    Raises:
        InputError: fewer than two values, or no slope.

    Example:
        >>> round(least_radius(np.array([1.0, 1.02]), typical_slope=1.0), 3)
        0.283
    """
    if len(repeated) < 2:
        raise InputError(f"{len(repeated)} evaluations were given, expected at least 2 to see how noisy they are")
    if not abs(typical_slope) > 0:
        raise InputError("typical_slope is 0, expected how much the loss changes for a unit step")
    return _NOISE_FACTOR * float(np.std(repeated, ddof=1)) / abs(typical_slope)


def check_differences(smoothing_radius: float, num_directions: int) -> None:
    """Refuse differences that make no sense.

    Raises:
        InputError: a radius that is not positive, or no direction.
    """
    if not 0 < smoothing_radius < np.inf:
        raise InputError(f"smoothing_radius is {smoothing_radius}, expected a positive number")
    if num_directions < 1:
        raise InputError(f"num_directions is {num_directions}, expected at least 1")

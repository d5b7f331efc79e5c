"""Slopes from differences, against exact ones."""

from __future__ import annotations

import numpy as np
import pytest

from cotune.errors import InputError
from cotune.sandwich.bilevel.slopes import estimate_mixed, estimate_slope, least_radius

A = np.array([[1.0, -2.0, 0.5], [0.0, 3.0, 1.0]])


def test_two_points_on_a_quadratic_are_exact_along_each_direction() -> None:
    z = np.array([1.0, -1.0])
    found = estimate_slope(
        lambda v: float(v @ v), z, smoothing_radius=0.5, num_directions=1, generator=np.random.default_rng(0)
    )
    direction = np.random.default_rng(0).standard_normal(2)
    assert found == pytest.approx(2 * float(z @ direction) * direction)


def test_the_mean_over_directions_is_the_gradient() -> None:
    z = np.array([1.0, -1.0])
    found = estimate_slope(
        lambda v: float(v @ v), z, smoothing_radius=0.1, num_directions=8000, generator=np.random.default_rng(0)
    )
    assert found == pytest.approx(2 * z, abs=0.15)


def test_four_points_give_the_mixed_derivative() -> None:
    # f = y' A x, so that the slope along x of (grad_y f . v) is A' v.
    x, y, along = np.ones(3), np.ones(2), np.array([1.0, 2.0])
    found = estimate_mixed(
        lambda u, v: float(v @ A @ u),
        x,
        y,
        along,
        smoothing_radius=0.1,
        num_directions=20000,
        generator=np.random.default_rng(1),
    )
    assert found == pytest.approx(A.T @ along, abs=0.5)


def test_the_least_radius_follows_the_noise() -> None:
    # Spread of (0, 2) is sqrt(2); slope -4.
    assert least_radius(np.array([0.0, 2.0]), -4.0) == pytest.approx(20 * 2**0.5 / 4)
    with pytest.raises(InputError, match="at least 2"):
        least_radius(np.array([1.0]), 1.0)
    with pytest.raises(InputError, match="typical_slope"):
        least_radius(np.zeros(2), 0.0)


@pytest.mark.parametrize(("radius", "num"), [(0.0, 1), (-1.0, 1), (float("inf"), 1), (1.0, 0)])
def test_differences_that_make_no_sense_are_refused(radius: float, num: int) -> None:
    with pytest.raises(InputError, match=r"smoothing_radius|num_directions"):
        estimate_slope(
            lambda z: 0.0, np.zeros(1), smoothing_radius=radius, num_directions=num, generator=np.random.default_rng(0)
        )

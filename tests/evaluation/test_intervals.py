from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cotune.errors import InputError
from cotune.evaluation.intervals import bootstrap_interval, student_interval


def test_two_values_by_hand() -> None:
    # Resampled means of [0, 1] are 0, 1/2, 1 with chances 1/4, 1/2, 1/4: the outer 2.5 % are 0 and 1, and the
    # quantiles 0.3 and 0.7 both fall on 1/2.
    assert bootstrap_interval([0.0, 1.0], seed=0) == (0.0, 1.0)
    assert bootstrap_interval([0.0, 1.0], seed=0, level=0.4) == (0.5, 0.5)


def test_agrees_with_the_normal_approximation() -> None:
    values = np.random.default_rng(1).normal(3.0, 2.0, size=400)
    low, high = bootstrap_interval(values, seed=2)
    standard_error = values.std() / np.sqrt(400)
    assert low == pytest.approx(values.mean() - 1.96 * standard_error, abs=0.03)
    assert high == pytest.approx(values.mean() + 1.96 * standard_error, abs=0.03)


def test_seed_decides_and_memory_bound_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    values = list(np.random.default_rng(3).random(50))
    first = bootstrap_interval(values, seed=7)
    assert bootstrap_interval(values, seed=7) == first
    assert bootstrap_interval(values, seed=8) != first
    monkeypatch.setattr("cotune.evaluation.intervals._DRAWS_AT_ONCE", 64)
    assert bootstrap_interval(values, seed=7) == first


@given(st.lists(st.floats(0.0, 1.0), min_size=1, max_size=20), st.integers(0, 2**32), st.floats(0.1, 0.99))
def test_lies_within_the_values_and_widens_with_the_level(values: list[float], seed: int, level: float) -> None:
    low, high = bootstrap_interval(values, seed, level, num_resamples=50)
    wide_low, wide_high = bootstrap_interval(values, seed, (1.0 + level) / 2.0, num_resamples=50)
    assert min(values) - 1e-12 <= wide_low <= low <= high <= wide_high <= max(values) + 1e-12


def test_says_what_is_wrong() -> None:
    with pytest.raises(InputError, match="at least one example"):
        bootstrap_interval([], seed=0)
    with pytest.raises(InputError, match="nan or inf"):
        bootstrap_interval([0.1, float("nan")], seed=0)
    with pytest.raises(InputError, match="level is 95"):
        bootstrap_interval([0.1], seed=0, level=95)
    with pytest.raises(InputError, match="num_resamples is 0"):
        bootstrap_interval([0.1], seed=0, num_resamples=0)


def test_student_interval_by_hand() -> None:
    # 1, 2, 3: standard deviation 1, t(2) = 4.303, so 4.303 / sqrt(3) to either side.
    mean, low, high = student_interval([1.0, 2.0, 3.0])
    assert (mean, low, high) == pytest.approx((2.0, 2.0 - 2.4843, 2.0 + 2.4843), abs=1e-3)
    mean, low, high = student_interval([0.0, 1.0] * 50)
    assert (low, high) == pytest.approx((0.5 - 1.96 * 0.50252 / 10, 0.5 + 1.96 * 0.50252 / 10), abs=1e-4)


def test_one_run_says_nothing_about_its_spread() -> None:
    mean, low, high = student_interval([0.25])
    assert mean == 0.25 and math.isnan(low) and math.isnan(high)


@pytest.mark.parametrize("values", [[], [1.0, math.nan], [math.inf]])
def test_student_interval_refuses_what_is_no_number(values: list[float]) -> None:
    with pytest.raises(InputError, match="at least one number"):
        student_interval(values)

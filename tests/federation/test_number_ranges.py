"""Numbers in range and out of it, with the sentence that says so."""

from __future__ import annotations

import math

import pytest

from cotune.errors import InputError
from cotune.federation.number_ranges import check_at_least, check_at_most, check_positive


def test_numbers_in_range_pass() -> None:
    check_at_least(1, num_steps=1, batch_size=2**40)
    check_at_least(0, num_judge=0, tolerance=math.inf)
    check_at_most(2**24, num_directions=2**24, num_seeds=-1)
    check_positive(learning_rate=5e-324, zo_eps=1.7e308)


@pytest.mark.parametrize("number", [0, -1, math.nan])
def test_a_number_below_the_least_is_named(number: float) -> None:
    with pytest.raises(InputError, match=rf"^batch_size is {number}, expected at least 1$"):
        check_at_least(1, num_steps=1, batch_size=number)
    with pytest.raises(InputError, match=r"^seed is -1, expected at least 0$"):
        check_at_least(0, seed=-1)


@pytest.mark.parametrize("number", [0.0, -1e-9, math.inf, math.nan])
def test_a_number_that_is_not_positive_and_finite_is_named(number: float) -> None:
    with pytest.raises(InputError, match=rf"^zo_eps is {number}, expected a positive number$"):
        check_positive(learning_rate=0.1, zo_eps=number)


def test_a_number_above_the_most_is_named() -> None:
    with pytest.raises(InputError, match=r"^num_directions is 16777217, expected at most 16777216$"):
        check_at_most(2**24, num_seeds=3, num_directions=2**24 + 1)

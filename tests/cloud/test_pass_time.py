"""Which rows a pass is worth, from how long passes took."""

from __future__ import annotations

import numpy as np
import pytest

from cotune.cloud.pass_time import PassTime


def measured(once_s: float, each_s: float, noise_s: float = 0.0) -> PassTime:
    rng, times = np.random.default_rng(0), PassTime()
    for rows in rng.integers(1, 40, 80).tolist():
        times.add(rows, once_s + each_s * rows + noise_s * rng.standard_normal())
    return times


def test_the_line_is_found_also_in_noise() -> None:
    assert measured(0.004, 0.0005).line == pytest.approx((0.004, 0.0005))
    assert measured(0.004, 0.0005, noise_s=0.0005).line == pytest.approx((0.004, 0.0005), rel=0.15)


def test_too_little_is_no_line_and_then_all_rows_are_worth_it() -> None:
    times = PassTime()
    for _ in range(7):
        times.add(3, 0.01)
    times.add(5, 0.01)
    assert times.line is None
    for _ in range(200):
        times.add(4, 0.01)
    assert times.line is None  # always four rows by now: nobody knows what a fifth costs
    assert times.is_worth(0.001, num_rows=4, tokens=4.0)


def test_what_is_long_ago_is_forgotten() -> None:
    times = measured(0.1, 0.01)
    for rows in [*range(1, 40)] * 8:
        times.add(rows, 0.002 + 0.001 * rows)
    assert times.line == pytest.approx((0.002, 0.001), rel=0.2)


def test_a_row_is_worth_it_if_tokens_a_second_rise() -> None:
    """(sum + p) / (a + b (n + 1)) against sum / (a + b n), by hand for every case."""
    for once_s, each_s in ((0.004, 0.0005), (0.001, 0.003), (0.01, 0.0)):
        times = measured(once_s, each_s)
        for num_rows in (1, 4, 16, 64):
            tokens = 0.9 * num_rows
            for chance in (0.05, 0.3, 0.6, 0.95):
                before = tokens / (once_s + each_s * num_rows)
                after = (tokens + chance) / (once_s + each_s * (num_rows + 1))
                if abs(after / before - 1) > 1e-6:
                    assert times.is_worth(chance, num_rows=num_rows, tokens=tokens) is (after > before)


def test_passes_that_seem_to_get_faster_with_more_rows_are_taken_as_free() -> None:
    times = PassTime()
    for rows in range(1, 40):
        times.add(rows, 0.1 - 0.001 * rows)
    assert times.line is not None and times.line[1] == 0.0

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cotune.errors import InputError
from cotune.federation.robust.clip_to_median_norm import ClipToMedianNorm
from cotune.federation.robust.leave_out_long import LeaveOutLong, too_long
from cotune.federation.robust.mean import Mean
from cotune.federation.robust.median import Median
from cotune.federation.robust.multi_krum import MultiKrum
from cotune.federation.robust.rule import RobustRule
from cotune.federation.robust.trimmed_mean import TrimmedMean

# Norms 5, 10, 100, 1, 10, 13, 50; their median is 10, so that those of 100 and 50 are too long, and at 6 of 50 not.
UPDATES = np.array([[3, 4], [0, 10], [60, -80], [1, 0], [6, 8], [5, 12], [-30, 40]], dtype=np.float32)
SHORT = [0, 1, 3, 4, 5]
INNER = [Mean(), Median(), TrimmedMean(share=0.2), MultiKrum(num_byzantine=1), ClipToMedianNorm(rule=Mean())]


@pytest.mark.parametrize("rule", INNER)
def test_the_other_rule_sees_the_others_alone(rule: RobustRule) -> None:
    weights = np.arange(1.0, 8.0)
    combined = LeaveOutLong(rule=rule)(UPDATES, weights)
    assert np.array_equal(combined, rule(UPDATES[SHORT], weights[SHORT]))
    by_six = LeaveOutLong(rule=rule, times=6)
    assert np.array_equal(by_six(UPDATES, weights), rule(np.delete(UPDATES, 2, axis=0), np.delete(weights, 2)))


def test_by_hand() -> None:
    # Two liars of ten at ten times the median. Trimming alone cuts both and with them the honest 7 and 8.
    updates = np.array([[1], [2], [3], [4], [5], [6], [7], [8], [-60], [-60]], dtype=np.float32)
    trimmed = TrimmedMean(share=0.2)
    assert trimmed(updates, np.ones(10)).tolist() == [3.5]
    # Of the eight others one is cut at each end.
    assert LeaveOutLong(rule=trimmed)(updates, np.ones(10)).tolist() == [4.5]


def test_which_are_too_long() -> None:
    norms = np.array([1.0, 8.0, 2.0, 9.0, 2.0])
    # Not at four times the median, only above.
    assert too_long(norms, 4.0, most=5).tolist() == [3]
    assert too_long(norms, 1.5, most=5).tolist() == [3, 1] and too_long(norms, 1.5, most=1).tolist() == [3]
    assert too_long(norms, 1.5, most=0).tolist() == []
    assert too_long(np.zeros(3), 4.0, most=3).tolist() == []
    assert too_long(np.array([0, 0, 1.0]), 4.0, most=3).tolist() == [2]


@settings(max_examples=50)
@given(norms=st.lists(st.floats(0, 1e30), min_size=3, max_size=12), times=st.floats(1, 10))
def test_never_more_than_half(norms: list[float], times: float) -> None:
    assert len(too_long(np.array(norms), times, most=len(norms))) <= len(norms) // 2


def test_never_so_many_that_the_other_rule_refuses() -> None:
    """Five replies are what the trimmed mean needs; of six the longest goes, and the next one is cut at an end."""
    updates = np.array([[1.0], [2.0], [3.0], [4.0], [300.0], [-900.0]], dtype=np.float32)
    rule = LeaveOutLong(rule=TrimmedMean(share=0.2))
    assert rule(updates, np.ones(6)).tolist() == [3.0]
    five = updates[:5]
    assert np.array_equal(rule(five, np.ones(5)), rule.rule(five, np.ones(5)))


def test_where_nobody_is_too_long_nothing_changes() -> None:
    updates = np.random.default_rng(0).standard_normal((9, 40)).astype(np.float32)
    inner = ClipToMedianNorm(rule=TrimmedMean(share=0.2))
    assert np.array_equal(LeaveOutLong(rule=inner)(updates, np.ones(9)), inner(updates, np.ones(9)))


def test_matrix_and_weights_stay_as_they_are() -> None:
    updates, weights = UPDATES.copy(), np.ones(7)
    LeaveOutLong(rule=Mean())(updates, weights)
    assert np.array_equal(updates, UPDATES) and (weights == 1).all()


def test_lengths_are_those_of_scaled_rows() -> None:
    scales = np.array([1.0, 1.0, 0.2, 1.0, 1.0, 1.0, 1.0])
    # At a fifth the norm of 100 is 20, and only that of 50 is too long.
    left = [0, 1, 2, 3, 4, 5]
    expected = Mean()(UPDATES[left], np.ones(6), scales=scales[left])
    assert np.array_equal(LeaveOutLong(rule=Mean())(UPDATES, np.ones(7), scales=scales), expected)


def test_devices_left_out_before_have_no_norm() -> None:
    weights = np.array([1.0, 0.0, 0.0, 1.0, 1.0, 0.0, 1.0])
    # Norms 5, 1, 10, 50: the median is 7.5, and 50 is above 30.
    assert LeaveOutLong(rule=Mean())(UPDATES, weights).tolist() == np.float32([10 / 3, 4]).tolist()


def test_short_liars_have_long_honest_devices_left_out() -> None:
    """What the rule costs: with two zeros, the median norm is an honest one of the lower half."""
    honest = np.array([[1.0], [1.0], [1.0], [1.0], [6.0]], dtype=np.float32)
    updates = np.vstack([honest, np.zeros((2, 1), np.float32)])
    rule = LeaveOutLong(rule=TrimmedMean(share=0.2))
    # Without the honest 6, one is cut at each end of six: a zero and a one. The rule behind it alone keeps a 1 more.
    assert rule(updates, np.ones(7)).tolist() == [0.75]
    assert rule.rule(updates, np.ones(7)).tolist() == np.float32([4 / 5]).tolist()


@pytest.mark.parametrize(
    ("rule", "num_replies", "num_borne"),
    [
        # Up to half may be left out, and of five or six that are left the trimmed mean bears one.
        (TrimmedMean(share=0.2), 10, 1),
        (TrimmedMean(share=0.2), 5, 1),
        (TrimmedMean(share=0.2), 4, 0),
        # Ten are left of twenty.
        (TrimmedMean(share=0.2), 20, 2),
        (Median(), 10, 2),
        # Seven are left, as many as it needs.
        (MultiKrum(num_byzantine=2), 10, 2),
        (Mean(), 10, 0),
    ],
)
def test_bears_what_the_other_rule_bears_of_the_fewest_that_are_left(
    rule: RobustRule, num_replies: int, num_borne: int
) -> None:
    assert LeaveOutLong(rule=rule).max_byzantine(num_replies) == num_borne


def test_bad_settings_and_too_few_replies() -> None:
    assert LeaveOutLong(rule=MultiKrum(num_byzantine=3)).min_replies == 9
    with pytest.raises(InputError, match=r"2 replies .* leave_out_long with its rule needs at least 3"):
        LeaveOutLong(rule=Mean())(UPDATES[:2], np.ones(2))
    with pytest.raises(InputError, match="rule is 'mean'"):
        LeaveOutLong(rule="mean")  # type: ignore[arg-type]
    for times in (0.5, float("nan"), float("inf"), True, "4"):
        with pytest.raises(InputError, match=f"times is {times!r}, expected a finite number of median norms"):
            LeaveOutLong(rule=Mean(), times=times)  # type: ignore[arg-type]

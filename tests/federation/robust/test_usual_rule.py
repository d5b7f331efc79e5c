"""The usual rule, chosen by the number of replies that are there."""

from __future__ import annotations

import numpy as np
import pytest

from cotune.federation.robust.usual_rule import UsualRule, usual_rule


@pytest.mark.parametrize(
    ("rows", "expected", "num_bad"),
    [
        # One is itself, two are their mean, and a liar among them counts.
        ([[3.0, 4.0]], [3.0, 4.0], 0),
        ([[0.0, 5.0], [300.0, 400.0]], [150.0, 202.5], 0),
        # Norms 5, 5, 500: the last one is cut to a hundredth.
        ([[3.0, 4.0], [0.0, 5.0], [300.0, -400.0]], [2.0, 5 / 3], 0),
        # Of five each number loses its smallest and its largest.
        ([[1.0], [2.0], [3.0], [3.0], [1e6]], [8 / 3], 1),
        # Of four the far too long one is left out, and 3 is clipped to 2.
        ([[1.0], [2.0], [3.0], [1e6]], [5 / 3], 0),
        # Of six it is left out too; 3 is clipped to 2 and -4 to -2, and of each sign one is cut.
        ([[1.0], [2.0], [2.0], [3.0], [-4.0], [1e6]], [5 / 3], 1),
    ],
)
def test_each_number_of_replies_by_hand(rows: list[list[float]], expected: list[float], num_bad: int) -> None:
    updates = np.array(rows, np.float32)
    np.testing.assert_allclose(UsualRule()(updates, np.ones(len(rows))), expected, rtol=1e-6)
    assert UsualRule().max_byzantine(len(rows)) == num_bad


def test_replies_without_a_weight_are_not_counted() -> None:
    """Five rows of which two count are two replies: the rule for five would refuse them."""
    updates = np.array([[2.0], [4.0], [9.0], [9.0], [9.0]], np.float32)
    assert UsualRule()(updates, np.array([1.0, 1.0, 0.0, 0.0, 0.0])).tolist() == [3.0]
    scaled = UsualRule()(updates, np.array([1.0, 1.0, 0.0, 0.0, 0.0]), scales=np.array([0.5, 1.0, 1, 1, 1]))
    assert scaled.tolist() == [2.5]


def test_it_is_the_rule_of_that_number_to_the_bit() -> None:
    updates = np.random.default_rng(0).standard_normal((7, 5)).astype(np.float32)
    for num in range(1, 8):
        assert np.array_equal(UsualRule()(updates[:num], np.ones(num)), usual_rule(num)(updates[:num], np.ones(num)))


def test_places_that_one_device_fills_are_kept_where_replies_are_pooled() -> None:
    """Ten devices, each with its own place of ten: trimmed, nothing of it is left."""
    updates = np.eye(10, dtype=np.float32)
    assert not usual_rule(10)(updates, np.ones(10)).any()
    np.testing.assert_allclose(usual_rule(10, is_pooled=True)(updates, np.ones(10)), np.full(10, 0.1), rtol=1e-6)
    # A gross liar is left out, and one of the median norm counts as one device.
    liar = np.full(10, -1e6, np.float32)
    updates[0] = liar
    told = usual_rule(10, is_pooled=True)(updates, np.ones(10))
    np.testing.assert_allclose(told, [0.0, *[1 / 9] * 9], rtol=1e-6)

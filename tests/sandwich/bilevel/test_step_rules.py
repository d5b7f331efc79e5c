"""Steps by hand."""

from __future__ import annotations

import numpy as np
import pytest

from cotune.sandwich.bilevel.step_rules import AdamRule, PlainRule, clipped


def test_plain_steps_are_as_long_as_the_slope() -> None:
    assert PlainRule().step(np.array([1.0, 2.0]), np.array([1.0, -1.0]), 0.5).tolist() == [0.5, 2.5]


def test_adam_remembers() -> None:
    rule, x = AdamRule(), np.array([0.0, 0.0])
    x = rule.step(x, np.array([3.0, -0.1]), 0.1)
    assert x == pytest.approx([-0.1, 0.1], abs=1e-6)  # whatever the size of the slope
    # Then 0: the mean is 0.09 g / 0.19, its square 0.000999 g^2 / 0.001999.
    step = 0.1 * (0.09 / 0.19) / np.sqrt(0.000999 / 0.001999)
    assert rule.step(x, np.zeros(2), 0.1) == pytest.approx([-0.1 - step, 0.1 + step], abs=1e-6)


def test_only_long_slopes_are_clipped() -> None:
    assert clipped(np.array([3.0, 4.0]), 10.0).tolist() == [3.0, 4.0]
    assert clipped(np.array([3.0, 4.0]), 2.5).tolist() == [1.5, 2.0]

"""Bounds by hand, and that they hold."""

from __future__ import annotations

import math

import numpy as np
import pytest

from cotune.errors import InputError
from cotune.sandwich.bilevel.certificate import certify


def test_the_bounds_by_hand() -> None:
    losses = np.array([[0.5, 0.5, 0.7, 0.7], [0.4, 0.4, 0.5, 0.5]])
    found = certify(losses, 0, tolerance=0.1, delta=0.1)
    assert found.gap == pytest.approx(0.15)
    assert found.hoeffding == pytest.approx(0.15 + 2 * math.sqrt(math.log(2 / 0.1) / 8))
    variance, log_term = 4 * 0.05**2 / 3, math.log(4 / 0.1)
    assert found.bernstein == pytest.approx(0.15 + math.sqrt(2 * variance * log_term / 4) + 14 * log_term / 9)
    assert found.bound == 1.0  # no gap is larger, and this sample says nothing more
    assert not found.holds and "n = 4" in found.to_text() and "not certified" in found.to_text()
    assert "guarantee" not in found.to_text()


def test_the_bound_of_the_table_and_how_it_shrinks() -> None:
    # 8 prompts, n = 200: 2 sqrt(ln(160) / 400); 4,600 examples bring it to about 0.05.
    assert certify(np.zeros((8, 200)), 0, tolerance=1).hoeffding == pytest.approx(0.2253, abs=1e-4)
    assert certify(np.zeros((8, 4600)), 0, tolerance=0.05).holds


def test_the_best_prompt_has_no_gap() -> None:
    assert certify(np.array([[0.1, 0.2], [0.5, 0.9]]), 0, tolerance=1).gap == 0.0


def test_the_truth_is_below_the_bound_nearly_always() -> None:
    generator, num_false = np.random.default_rng(0), 0
    for _ in range(300):
        losses = (generator.random((3, 40)) < np.array([[0.6], [0.5], [0.3]])).astype(float)
        num_false += certify(losses, 0, tolerance=1, delta=0.2).bound < 0.3
    assert num_false <= 60


@pytest.mark.parametrize("losses", [np.zeros((2, 1)), np.full((2, 3), 1.5), np.zeros(3)])
def test_what_no_bound_is_known_for_is_refused(losses: np.ndarray) -> None:
    with pytest.raises(InputError):
        certify(losses, 0, tolerance=1)

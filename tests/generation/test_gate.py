"""The linear gate."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from cotune.errors import InputError
from cotune.generation.gate import Gate, consult_many


def test_three_scores_by_hand() -> None:
    gate = Gate(weight=np.array([2.0, -1.0], np.float32), bias=0.5, threshold=1.0)
    assert gate.score(np.array([1.0, 1.0], np.float32)) == 1.5
    assert gate.consults(np.array([1.0, 1.0], np.float32))
    assert not gate.consults(np.array([0.0, 1.0], np.float32))
    # On the threshold the device is left alone.
    assert not gate.consults(np.array([0.5, 0.5], np.float32))


def test_it_is_the_argmax_of_two_columns() -> None:
    """SPA's classifier M_c (hidden, 2): sigma = argmax softmax(f M_c)."""
    generator = np.random.default_rng(0)
    classifier = generator.standard_normal((16, 2))
    gate = Gate(weight=(classifier[:, 1] - classifier[:, 0]).astype(np.float32))
    for f in generator.standard_normal((200, 16)).astype(np.float32):
        assert gate.consults(f) == bool((f @ classifier).argmax())


def test_the_order_of_summation_does_not_matter() -> None:
    generator = np.random.default_rng(1)
    weight, hidden = generator.standard_normal((2, 4096)).astype(np.float32)
    order = generator.permutation(4096)
    score = Gate(weight=weight).score(hidden)
    assert Gate(weight=weight[order]).score(hidden[order]) == pytest.approx(score, abs=1e-12)


@pytest.mark.parametrize(
    "changes",
    [
        {"weight": np.zeros((2, 2), np.float32)},
        {"weight": np.zeros(2)},
        {"weight": np.array([np.nan, 1.0], np.float32)},
        {"bias": float("inf")},
        {"threshold": float("nan")},
    ],
)
def test_impossible_gates_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="gate"):
        Gate(**{"weight": np.zeros(2, np.float32), **changes})


def test_another_hidden_size_is_refused() -> None:
    with pytest.raises(InputError, match=r"shape \(3,\), expected \(2,\)"):
        Gate(weight=np.zeros(2, np.float32)).score(np.zeros(3, np.float32))


def test_many_gates_at_once_answer_as_each_alone() -> None:
    rng = np.random.default_rng(0)
    hidden = rng.standard_normal((40, 33)).astype(np.float32)
    gates = [
        None if i % 5 == 0 else Gate(weight=rng.standard_normal(33).astype(np.float32), bias=0.1 * i, threshold=1.0)
        for i in range(40)
    ]
    expected = [gate is None or gate.consults(row) for gate, row in zip(gates, hidden, strict=True)]
    assert consult_many(gates, hidden) == expected
    assert True in expected and False in expected

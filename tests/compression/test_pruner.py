"""How amounts are read."""

from __future__ import annotations

import pytest

from cotune.compression.pruner import count_of, share_of, sparsity_of
from cotune.compression.sparsity import GroupSparsity, LayerSparsity, RowSparsity
from cotune.errors import InputError


def test_amounts_come_as_numbers_words_and_patterns() -> None:
    assert sparsity_of(0.5, LayerSparsity) == sparsity_of("0.5", LayerSparsity) == LayerSparsity(0.5)
    assert sparsity_of("4:8", RowSparsity) == GroupSparsity(4, 8)
    assert sparsity_of(RowSparsity(0.3), LayerSparsity) == RowSparsity(0.3)
    assert share_of("0.25") == share_of(0.25) == 0.25
    assert count_of("2") == count_of(2) == count_of(2.0) == 2


def test_other_amounts_are_one_clear_sentence() -> None:
    for amount in ("2:4", "half", 0, 1, 1.5, float("nan"), RowSparsity(0.5)):
        with pytest.raises(InputError, match=r"expected a share above 0 and below 1, such as 0\.25"):
            share_of(amount)
    with pytest.raises(InputError, match="such as 2:4"):
        sparsity_of("2:x", RowSparsity)
    with pytest.raises(InputError, match="the amount is '2:4', expected a whole number of blocks"):
        count_of("2:4")

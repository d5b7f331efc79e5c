"""Magnitude pruning against what is worked out by hand."""

from __future__ import annotations

import pytest
import torch

from cotune.compression.magnitude import prune_by_magnitude
from cotune.compression.sparsity import GroupSparsity, LayerSparsity, RowSparsity
from cotune.errors import InputError

WEIGHT = torch.tensor([[5.0, -1.0, 2.0, 6.0], [-7.0, 8.0, -3.0, 4.0]])


def test_the_smallest_go_by_hand() -> None:
    by_layer = [[5.0, 0.0, 0.0, 6.0], [-7.0, 8.0, 0.0, 0.0]]
    assert prune_by_magnitude(WEIGHT, LayerSparsity(0.5)).tolist() == by_layer
    assert prune_by_magnitude(WEIGHT, RowSparsity(0.25)).tolist() == [[5, 0, 2, 6], [-7, 8, 0, 4]]
    assert prune_by_magnitude(WEIGHT, GroupSparsity(2, 4)).tolist() == by_layer
    assert prune_by_magnitude(WEIGHT, LayerSparsity(3 / 8)).tolist() == [[5, 0, 0, 6], [-7, 8, 0, 4]]


def test_a_width_without_the_pattern_is_refused() -> None:
    with pytest.raises(InputError, match="multiple of 3"):
        prune_by_magnitude(WEIGHT, GroupSparsity(1, 3))

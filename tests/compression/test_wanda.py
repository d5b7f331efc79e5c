"""Wanda against its equation in NumPy and by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from compressible import correlated_layer

from cotune.compression.calibration import LayerStatistics, reconstruction_error
from cotune.compression.magnitude import prune_by_magnitude
from cotune.compression.sparsity import GroupSparsity, LayerSparsity, RowSparsity
from cotune.compression.wanda import prune_by_wanda
from cotune.errors import InputError


def test_by_hand() -> None:
    """Norms 1, 2 and 10: scores 3, 4, 10 and 9, 10, 2."""
    inputs = torch.tensor([[1.0, 0.0, 6.0], [0.0, 2.0, 8.0]])
    weight = torch.tensor([[3.0, 2.0, 1.0], [-9.0, 5.0, 0.2]])
    statistics = LayerStatistics.of_inputs(inputs)
    by_row = prune_by_wanda(weight, statistics, RowSparsity(2 / 3))
    torch.testing.assert_close(by_row, torch.tensor([[0.0, 0.0, 1.0], [0.0, 5.0, 0.0]]))
    by_layer = prune_by_wanda(weight, statistics, LayerSparsity(0.5))
    torch.testing.assert_close(by_layer, torch.tensor([[0.0, 0.0, 1.0], [-9.0, 5.0, 0.0]]))


@pytest.mark.parametrize("pattern", ["row", "2:4"])
@pytest.mark.parametrize("needs_gram", [True, False])
def test_the_equation_in_numpy(pattern: str, needs_gram: bool) -> None:
    weight, statistics = correlated_layer(3)
    if not needs_gram:
        statistics = LayerStatistics(None, statistics.num_rows, squared_norms=statistics.squared_norms)
    sparsity = RowSparsity(0.5) if pattern == "row" else GroupSparsity(2, 4)
    pruned = prune_by_wanda(weight, statistics, sparsity).numpy()
    norms = np.sqrt(statistics.squared_norms.numpy())
    expected = weight.numpy().copy()
    width = 16 if pattern == "row" else 4
    for row in expected:
        scores = np.abs(row) * norms
        for start in range(0, 16, width):
            lowest = start + np.argsort(scores[start : start + width])[: width // 2]
            row[lowest] = 0
    np.testing.assert_array_equal(pruned, expected)


def test_it_loses_less_of_the_outputs_than_magnitude() -> None:
    errors = []
    for seed in range(5):
        weight, statistics = correlated_layer(seed)
        for sparsity in (RowSparsity(0.5), GroupSparsity(2, 4)):
            by_wanda = prune_by_wanda(weight, statistics, sparsity)
            by_magnitude = prune_by_magnitude(weight, sparsity)
            errors.append([reconstruction_error(weight, new, statistics.gram) for new in (by_wanda, by_magnitude)])
    assert all(wanda <= magnitude for wanda, magnitude in errors)


def test_a_width_without_the_pattern_is_refused() -> None:
    weight, statistics = correlated_layer(0)
    with pytest.raises(InputError, match="multiple of 5"):
        prune_by_wanda(weight, statistics, GroupSparsity(2, 5))

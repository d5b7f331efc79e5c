"""SparseGPT against Optimal Brain Surgeon one weight at a time, and by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from compressible import correlated_layer
from numpy.typing import NDArray

from cotune.compression.calibration import LayerStatistics, reconstruction_error
from cotune.compression.magnitude import prune_by_magnitude
from cotune.compression.sparse_gpt import inverse_factor, prune_by_sparse_gpt
from cotune.compression.sparsity import GroupSparsity, LayerSparsity, RowSparsity, Sparsity
from cotune.compression.wanda import prune_by_wanda
from cotune.errors import InputError

Matrix = NDArray[np.float64]


def surgeon(weight: Matrix, gram: Matrix, kind: str, *, at_once: int, damping: float = 0.01) -> Matrix:
    """Column by column, the inverse of what is left computed anew for each."""
    weight, (num_rows, num_columns) = weight.copy(), weight.shape
    hessian = gram + damping * np.mean(np.diag(gram)) * np.eye(num_columns)
    inverses = [np.linalg.inv(hessian[column:, column:]) for column in range(num_columns)]
    goes: set[tuple[int, int]] = set()
    for column in range(num_columns):
        if column % at_once == 0:
            columns = range(column, min(column + at_once, num_columns))
            cost = {(r, c): weight[r, c] ** 2 / inverses[c][0, 0] for r in range(num_rows) for c in columns}
            if kind == "layer":
                goes |= set(sorted(cost, key=lambda place: cost[place])[: len(cost) // 2])
            else:
                for row in range(num_rows):
                    of_row = [(row, c) for c in columns]
                    goes |= set(sorted(of_row, key=lambda place: cost[place])[: len(of_row) // 2])
        inverse = inverses[column]
        for row in range(num_rows):
            if (row, column) in goes:
                weight[row, column:] -= weight[row, column] / inverse[0, 0] * inverse[0]
                weight[row, column] = 0
    return weight


@pytest.mark.parametrize(
    ("sparsity", "kind", "at_once"),
    [
        (LayerSparsity(0.5), "layer", 16),
        (LayerSparsity(0.5), "layer", 6),
        (RowSparsity(0.5), "row", 8),
        (GroupSparsity(2, 4), "row", 4),
    ],
)
def test_it_is_the_surgeon_column_by_column(sparsity: Sparsity, kind: str, at_once: int) -> None:
    weight, statistics = correlated_layer(1)
    # Groups are decided one by one in blocks of 8; in the other cases a block is decided at once.
    block_size = 8 if sparsity.group > 1 else at_once
    pruned = prune_by_sparse_gpt(weight.double(), statistics, sparsity, block_size=block_size)
    expected = surgeon(weight.double().numpy(), statistics.gram.numpy(), kind, at_once=at_once)
    np.testing.assert_allclose(pruned.numpy(), expected, rtol=1e-9, atol=1e-9)
    assert int((pruned == 0).sum()) == 96


def test_the_size_of_a_block_does_not_matter_to_groups() -> None:
    weight, statistics = correlated_layer(2)
    whole = prune_by_sparse_gpt(weight, statistics, GroupSparsity(2, 4))
    for block_size in (4, 7, 12, 1):
        torch.testing.assert_close(
            prune_by_sparse_gpt(weight, statistics, GroupSparsity(2, 4), block_size=block_size), whole
        )


def test_by_hand() -> None:
    """X^T X = [[3, 1], [1, 3]], inverse [[3, -1], [-1, 3]] / 8.

    Costs of (1, 3): 1 / (3/8) and 9 / (1/3). The first goes, and the second gets 1 / (3/8) * 1/8 = 1/3.
    Of (3, 1) the second goes (1 / (1/3) against 9 / (3/8)), and what is behind is left alone.
    """
    statistics = LayerStatistics.of_inputs(torch.tensor([[1.0, 1.0], [1.0, -1.0], [1.0, 1.0]]))
    weight = torch.tensor([[1.0, 3.0], [3.0, 1.0]])
    pruned = prune_by_sparse_gpt(weight, statistics, RowSparsity(0.5), damping=0.0)
    torch.testing.assert_close(pruned, torch.tensor([[0.0, 10 / 3], [3.0, 0.0]]))


def test_damping_is_a_share_of_the_mean_diagonal() -> None:
    factor = inverse_factor(torch.tensor([[2.0, 0.0], [0.0, 6.0]]).double(), damping=0.5)
    torch.testing.assert_close(factor.T @ factor, torch.diag(torch.tensor([1 / 4, 1 / 8]).double()))


def test_weights_of_dead_inputs_go_first() -> None:
    weight, statistics = correlated_layer(4)
    inputs = torch.linalg.cholesky(statistics.gram, upper=True).clone()
    inputs[:, [2, 9]] = 0
    dead = LayerStatistics.of_inputs(inputs)
    pruned = prune_by_sparse_gpt(weight, dead, LayerSparsity(0.5))
    assert not pruned[:, [2, 9]].any() and int((pruned == 0).sum()) == 96
    # The rest is pruned as if the dead inputs were not there.
    alive = [column for column in range(16) if column not in (2, 9)]
    diagonal = dead.gram.diagonal()
    alone = LayerStatistics(dead.gram[alive][:, alive], 16)
    share = (96 - 24) / (12 * 14)
    damping = 0.01 * float(diagonal.mean()) / float(alone.squared_norms.mean())
    expected = prune_by_sparse_gpt(weight[:, alive], alone, LayerSparsity(share), damping=damping)
    torch.testing.assert_close(pruned[:, alive], expected)
    nothing = LayerStatistics(torch.zeros(16, 16).double(), 5)
    assert not prune_by_sparse_gpt(weight, nothing, RowSparsity(0.5)).any()


def test_it_loses_less_of_the_outputs_than_wanda_and_magnitude() -> None:
    for seed in range(5):
        weight, statistics = correlated_layer(seed)
        for sparsity in (RowSparsity(0.5), GroupSparsity(2, 4)):
            news = [
                prune_by_sparse_gpt(weight, statistics, sparsity),
                prune_by_wanda(weight, statistics, sparsity),
                prune_by_magnitude(weight, sparsity),
            ]
            errors = [reconstruction_error(weight, new, statistics.gram) for new in news]
            assert errors == sorted(errors)
            assert {int((new == 0).sum()) for new in news} == {96}


def test_bad_input_is_one_clear_sentence() -> None:
    weight, statistics = correlated_layer(0)
    with pytest.raises(InputError, match="damping is -1, expected 0 or more"):
        prune_by_sparse_gpt(weight, statistics, RowSparsity(0.5), damping=-1)
    with pytest.raises(InputError, match=r"16 dimensions cannot be inverted with a damping of 0.0"):
        singular = LayerStatistics(torch.ones(16, 16).double(), 5)
        prune_by_sparse_gpt(weight, singular, RowSparsity(0.5), damping=0.0)
    with pytest.raises(InputError, match="multiple of 5"):
        prune_by_sparse_gpt(weight, statistics, GroupSparsity(2, 5))

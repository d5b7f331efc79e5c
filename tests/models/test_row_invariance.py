"""From how many rows on products do not depend on their number."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from cotune.models.row_invariance import few_sizes, min_invariant_rows, products

LIKE = torch.zeros(1)


def rowwise(rows: Tensor) -> Tensor:
    return rows * 2


def test_passes_have_few_sizes_and_little_padding() -> None:
    sizes = [few_sizes(n) for n in range(1, 513)]
    assert all(n <= size <= max(n + 7, 1.15 * n) for n, size in enumerate(sizes, start=1))
    assert sizes == sorted(sizes) and all(few_sizes(size) == size for size in sizes)
    assert len(set(sizes)) < 45


def test_products_that_never_differ_need_one_row() -> None:
    assert min_invariant_rows([(rowwise, 3)], LIKE) == 1


def test_the_worst_function_decides() -> None:
    def differs_below(number: int, rows: Tensor) -> Tensor:
        return rows * 2 if len(rows) >= number else rows * 2 + 1

    small, large = (lambda rows: differs_below(2, rows)), (lambda rows: differs_below(5, rows))
    assert min_invariant_rows([(small, 3)], LIKE) == 2
    assert min_invariant_rows([(rowwise, 3), (large, 3), (small, 3)], LIKE) == 8


def test_products_that_always_differ_have_no_such_number() -> None:
    assert min_invariant_rows([(lambda rows: rows * len(rows), 3)], LIKE) is None


def test_each_shape_of_a_model_is_tried_once() -> None:
    model = nn.ModuleDict(
        {
            "a": nn.Linear(3, 5),
            "b": nn.Linear(3, 5),
            "c": nn.Linear(3, 5, bias=False),
            "d": Conv1D(7, 4),
            "e": nn.Embedding(9, 3),
        }
    )
    assert sorted(width for _, width in products(model)) == [3, 3, 4]
    for function, width in products(model):
        assert function(torch.zeros(2, width)).shape[0] == 2

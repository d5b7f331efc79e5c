"""Allocations are counted to the byte."""

from __future__ import annotations

import torch

from cotune.evaluation.allocations import Allocations, count_allocations


def test_peak_and_rest_of_changes() -> None:
    assert Allocations.of_changes([]) == Allocations(peak_bytes=0, left_bytes=0)
    assert Allocations.of_changes([-8, 4, 6, -6]) == Allocations(peak_bytes=2, left_bytes=-4)


def test_temporaries_count_and_what_is_returned_is_dropped() -> None:
    # Two summands and their sum, then the sum alone.
    assert count_allocations(lambda: (torch.ones(500) + torch.ones(500)).mul_(2)).peak_bytes == 3 * 500 * 4


def test_what_stays_is_left() -> None:
    kept = []
    found = count_allocations(lambda: kept.append(torch.zeros(300, dtype=torch.float64)))
    assert found == Allocations(peak_bytes=2400, left_bytes=2400)
    assert count_allocations(kept.clear).left_bytes <= 0


def test_a_backward_pass_counts_what_autograd_keeps() -> None:
    weight = torch.ones(20, 30, requires_grad=True)
    x = torch.ones(50, 20)

    def forward_and_back() -> None:
        ((x @ weight).exp() * 2).sum().backward()

    forward_and_back()
    weight.grad = None
    # exp keeps its result; backwards, the gradients of the doubling and of exp stand beside it.
    assert 3 * 50 * 30 * 4 <= count_allocations(forward_and_back).peak_bytes <= 3 * 50 * 30 * 4 + 20 * 30 * 4 + 100

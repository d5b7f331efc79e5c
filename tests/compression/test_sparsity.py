"""Patterns of zeros: exact counts, ties, and pieces that add up to the whole."""

from __future__ import annotations

import pytest
import torch

from cotune.compression.sparsity import GroupSparsity, LayerSparsity, RowSparsity, Sparsity, parse_group, share_of_zeros
from cotune.errors import InputError


@pytest.fixture
def scores() -> torch.Tensor:
    return torch.rand(7, 12, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("share", [0.0, 0.1, 0.35, 0.5, 0.7, 1.0])
def test_rows_lose_the_same_number_and_the_lowest(scores: torch.Tensor, share: float) -> None:
    pruned = RowSparsity(share).pruned(scores)
    num = {0.0: 0, 0.1: 1, 0.35: 4, 0.5: 6, 0.7: 8, 1.0: 12}[share]
    assert pruned.sum(1).tolist() == [num] * 7
    for row, goes in zip(scores.tolist(), pruned.tolist(), strict=True):
        assert sorted(row)[:num] == sorted(score for score, gone in zip(row, goes, strict=True) if gone)


def test_a_layer_loses_its_lowest_wherever_they_are(scores: torch.Tensor) -> None:
    scores[2] += 1
    pruned = LayerSparsity(0.5).pruned(scores)
    assert int(pruned.sum()) == 42 and not pruned[2].any()
    assert scores[pruned].max() < scores[~pruned].min()


def test_every_group_of_four_keeps_its_two_largest(scores: torch.Tensor) -> None:
    pruned = GroupSparsity(2, 4).pruned(scores)
    for row in range(7):
        for start in range(0, 12, 4):
            lowest = scores[row, start : start + 4].argsort()[:2].tolist()
            assert pruned[row, start : start + 4].nonzero().flatten().tolist() == sorted(lowest)
    assert GroupSparsity(2, 4).share == 0.5 and GroupSparsity(3, 4).share == 0.25


@pytest.mark.parametrize("sparsity", [RowSparsity(0.5), LayerSparsity(0.5), GroupSparsity(2, 4)])
def test_of_equal_scores_the_first_goes(sparsity: Sparsity) -> None:
    pruned = sparsity.pruned(torch.ones(2, 40))
    repeated = torch.tensor([1, 1, 0, 0] * 10) if sparsity.group == 4 else torch.tensor([1] * 20 + [0] * 20)
    expected = torch.stack([repeated, repeated])
    if isinstance(sparsity, LayerSparsity):
        expected = torch.tensor([[1] * 40, [0] * 40])
    assert torch.equal(pruned.int(), expected)


@pytest.mark.parametrize("sparsity", [RowSparsity(0.37), LayerSparsity(0.37), GroupSparsity(1, 4)])
@pytest.mark.parametrize("width", [4, 8, 12])
def test_pieces_lose_as_many_as_the_whole(scores: torch.Tensor, sparsity: Sparsity, width: int) -> None:
    pieces = [
        sparsity.pruned(scores[:, start : start + width], first=start) for start in range(0, scores.shape[1], width)
    ]
    assert torch.cat(pieces, 1).sum() == sparsity.pruned(scores).sum()
    assert max(abs(float(piece.float().mean()) - sparsity.share) for piece in pieces) <= 0.5 / 4 + 0.01


def test_zeros_are_counted() -> None:
    assert share_of_zeros(torch.tensor([[0.0, -0.0, 1.0, -2.0]])) == 0.5


def test_bad_patterns_are_one_clear_sentence() -> None:
    assert parse_group("4:8") == GroupSparsity(4, 8)
    for text in ("2", "2:", "0.5", "2:4:8", "-2:4", "2:4 ", "two:four"):
        with pytest.raises(InputError, match=r"expected kept and all weights of a group, such as 2:4"):
            parse_group(text)
    for kept, group in ((4, 4), (0, 4), (5, 4)):
        with pytest.raises(InputError, match="expected fewer kept than there are"):
            GroupSparsity(kept, group)
    for share in (-0.1, 1.1, float("nan")):
        for kind in (RowSparsity, LayerSparsity):
            with pytest.raises(InputError, match="expected 0 to 1"):
                kind(share)
    with pytest.raises(InputError, match="10 inputs, expected a multiple of 4 for the pattern 2:4"):
        GroupSparsity(2, 4).pruned(torch.ones(1, 10))

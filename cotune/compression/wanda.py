"""Wanda: weights go by their size times the size of what they multiply (Sun et al., arXiv 2306.11695)."""

from __future__ import annotations

from torch import Tensor

from cotune.compression.calibration import LayerStatistics
from cotune.compression.sparsity import Sparsity


def prune_by_wanda(weight: Tensor, statistics: LayerStatistics, sparsity: Sparsity) -> Tensor:
    """Set the weights with the smallest |W_ij| * ||X_j||_2 to zero; the others stay as they are.

    Equation 1 of the paper: X_j is input j of all calibration tokens. The paper compares within each output, which is
    `RowSparsity`.

    Args:
        weight: W, (out, in).
        statistics: of the layer; `squared_norms` alone is read.
        sparsity: how many, and where they may be.

    Raises:
        InputError: the layer's width does not have the pattern.

    Example:
        >>> import torch
        >>> from cotune.compression.sparsity import RowSparsity
        >>> inputs = torch.tensor([[3.0, 1.0], [4.0, 0.0]])  # norms 5 and 1
        >>> prune_by_wanda(torch.tensor([[1.0, 4.0]]), LayerStatistics.of_inputs(inputs), RowSparsity(0.5)).tolist()
        [[1.0, 0.0]]
    """
    sparsity.check(weight.shape[1])
    scores = weight.abs().double() * statistics.squared_norms.sqrt()
    return weight.masked_fill(sparsity.pruned(scores), 0)

"""Magnitude pruning: the smallest weights become zero, whatever the layer reads (Han et al., arXiv 1506.02626)."""

from __future__ import annotations

from torch import Tensor

from cotune.compression.sparsity import Sparsity


def prune_by_magnitude(weight: Tensor, sparsity: Sparsity) -> Tensor:
    """Set the weights with the smallest |W_ij| to zero.

    Args:
        weight: W, (out, in).
        sparsity: how many, and where they may be.

    Raises:
        InputError: the layer's width does not have the pattern.

    Example:
        >>> import torch
        >>> from cotune.compression.sparsity import LayerSparsity
        >>> prune_by_magnitude(torch.tensor([[4.0, -1.0], [-2.0, 3.0]]), LayerSparsity(0.5)).tolist()
        [[4.0, 0.0], [0.0, 3.0]]
    """
    sparsity.check(weight.shape[1])
    return weight.masked_fill(sparsity.pruned(weight.abs()), 0)

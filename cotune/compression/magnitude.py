"""Magnitude pruning: the smallest weights become zero, whatever the layer reads (Han et al., arXiv 1506.02626)."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

from cotune.compression.calibration import LayerProgress, LayerStatistics, compress_linears, compress_weights
from cotune.compression.pruner import Amount, Facts, check_layers, sparsity_of
from cotune.compression.sparsity import LayerSparsity, Sparsity


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


@dataclass(frozen=True, kw_only=True)
class Magnitude:
    """Over every linear layer of a model's blocks."""

    def prune(
        self,
        model: PreTrainedModel,
        amount: Amount,
        input_ids: NDArray[np.int64] | None,
        *,
        skip: Collection[str] = (),
        batch_size: int = 4,
        on_layer: Callable[[LayerProgress], None] | None = None,
    ) -> Facts:
        """See `Pruner`. A share is of each layer. Texts only serve to say what each layer loses."""
        sparsity = sparsity_of(amount, LayerSparsity)
        check_layers(model, sparsity, skip)
        if input_ids is None:
            compress_weights(model, lambda weight: prune_by_magnitude(weight, sparsity), skip=skip, on_layer=on_layer)
            return {}

        def compress_layer(weight: Tensor, statistics: LayerStatistics) -> Tensor:
            return prune_by_magnitude(weight, sparsity)

        compress_linears(model, input_ids, compress_layer, skip=skip, batch_size=batch_size, on_layer=on_layer)
        return {}

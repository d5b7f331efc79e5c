"""Wanda: weights go by their size times the size of what they multiply (Sun et al., arXiv 2306.11695)."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

from cotune.compression.calibration import LayerProgress, LayerStatistics, compress_linears
from cotune.compression.pruner import Amount, Facts, check_layers, sparsity_of, texts_of
from cotune.compression.sparsity import RowSparsity, Sparsity


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


@dataclass(frozen=True, kw_only=True)
class Wanda:
    """Over every linear layer of a model's blocks."""

    needs_gram: bool = True
    """Whether to measure what each layer loses, for which more is computed than Wanda itself needs."""

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
        """See `Pruner`. A share is of each row."""
        sparsity = sparsity_of(amount, RowSparsity)
        check_layers(model, sparsity, skip)
        ids = texts_of(input_ids)

        def compress_layer(weight: Tensor, statistics: LayerStatistics) -> Tensor:
            return prune_by_wanda(weight, statistics, sparsity)

        compress_linears(
            model,
            ids,
            compress_layer,
            skip=skip,
            batch_size=batch_size,
            needs_gram=self.needs_gram,
            on_layer=on_layer,
        )
        return {}

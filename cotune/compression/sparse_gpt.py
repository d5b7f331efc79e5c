"""SparseGPT: weights that stay make up for those that go (Frantar and Alistarh, arXiv 2301.00774, Algorithm 1).

Columns are decided from left to right. With H = X^T X + damping and F the inverse of H over the columns that are not
passed yet, a weight w in column c costs w^2 / F_cc (Optimal Brain Surgeon). Those that cost least become zero, and the
later weights of their row change by - w / F_cc * F_c. All rows share H, so that one Cholesky factor gives all that is
needed: with U upper and H^-1 = U^T U, U_cc^2 = F_cc, and row c of U is F_c / U_cc.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

from cotune.compression.calibration import LayerProgress, LayerStatistics, compress_linears
from cotune.compression.pruner import Amount, Facts, check_layers, sparsity_of, texts_of
from cotune.compression.sparsity import LayerSparsity, Sparsity
from cotune.errors import InputError

BLOCK_SIZE = 128
DAMPING = 0.01


def prune_by_sparse_gpt(
    weight: Tensor,
    statistics: LayerStatistics,
    sparsity: Sparsity,
    *,
    block_size: int = BLOCK_SIZE,
    damping: float = DAMPING,
) -> Tensor:
    """Set weights to zero and repair the others.

    The inputs that are always zero take their weights with them, so that a layer may lose more than was asked where
    it has many of those.

    Args:
        weight: W, (out, in).
        statistics: of the layer, with its Gram matrix.
        sparsity: how many, and where they may be. The paper takes `LayerSparsity`, which decides over all rows of a
            block of columns, or 2:4.
        block_size: columns that are decided at once (but for 2:4, which decides at every group), at least 1.
        damping: added to the diagonal of X^T X, as a share of its mean.

    Raises:
        InputError: the layer's width does not have the pattern, or X^T X cannot be inverted.

    Example:
        >>> from cotune.compression.sparsity import RowSparsity
        >>> inputs = torch.tensor([[1.0, 1.0], [1.0, -1.0], [1.0, 1.0]])
        >>> statistics = LayerStatistics.of_inputs(inputs)
        >>> prune_by_sparse_gpt(torch.tensor([[1.0, 3.0]]), statistics, RowSparsity(0.5), damping=0.0)
        tensor([[0.0000, 3.3333]])
    """
    num_inputs = weight.shape[1]
    sparsity.check(num_inputs)
    # A whole number of groups, so that none is cut.
    block_size = max(1, block_size // sparsity.group) * sparsity.group
    at_once = sparsity.group if sparsity.group > 1 else block_size
    factor = inverse_factor(statistics.gram, damping=damping)
    pruned = weight.double().masked_fill(statistics.squared_norms == 0, 0)
    for start in range(0, num_inputs, block_size):
        end = min(start + block_size, num_inputs)
        block, own = pruned[:, start:end].clone(), factor[start:end, start:end]
        errors = torch.zeros_like(block)
        goes = torch.zeros_like(block, dtype=torch.bool)
        for column in range(end - start):
            if column % at_once == 0:
                group = slice(column, min(column + at_once, end - start))
                costs = (block[:, group] / own.diagonal()[group]).square()
                goes[:, group] = sparsity.pruned(costs, first=start + column)
            gone = block[:, column].masked_fill(~goes[:, column], 0)
            errors[:, column] = gone / own[column, column]
            block[:, column:] -= errors[:, column, None] * own[column, column:]
        pruned[:, start:end] = block.masked_fill(goes, 0)
        # The columns behind the block are repaired once for all of it.
        pruned[:, end:] -= errors @ factor[start:end, end:]
    return pruned.to(weight.dtype)


def inverse_factor(gram: Tensor, *, damping: float) -> Tensor:
    """The upper Cholesky factor U of (X^T X + damping * its mean diagonal)^-1, float64 (in, in), H^-1 = U^T U.

    Args:
        gram: X^T X, float64 (in, in).
        damping: share of the mean diagonal, 0 or more. Inputs that are always zero count as ones of mean size.

    Raises:
        InputError: the matrix cannot be inverted.
    """
    if not damping >= 0:
        raise InputError(f"damping is {damping}, expected 0 or more, such as {DAMPING}")
    hessian, diagonal = gram.clone(), gram.diagonal()
    mean = float(diagonal.mean()) or 1.0
    hessian.diagonal().add_(damping * mean)[diagonal == 0] += mean
    lower, failed = torch.linalg.cholesky_ex(hessian)
    if not int(failed):
        factor: Tensor
        factor, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
        if not int(failed):
            return factor
    raise InputError(
        f"the inputs' Gram matrix of {len(gram)} dimensions cannot be inverted with a damping of {damping}; "
        "take a larger damping or more calibration texts"
    )


@dataclass(frozen=True, kw_only=True)
class SparseGpt:
    """Over every linear layer of a model's blocks."""

    block_size: int = BLOCK_SIZE
    """Columns that are decided at once."""
    damping: float = DAMPING
    """Added to the diagonal of X^T X, as a share of its mean."""

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
        """See `Pruner`. A share is of each block of columns, all rows together."""
        sparsity = sparsity_of(amount, LayerSparsity)
        check_layers(model, sparsity, skip)
        ids = texts_of(input_ids)

        def compress_layer(weight: Tensor, statistics: LayerStatistics) -> Tensor:
            return prune_by_sparse_gpt(weight, statistics, sparsity, block_size=self.block_size, damping=self.damping)

        compress_linears(model, ids, compress_layer, skip=skip, batch_size=batch_size, on_layer=on_layer)
        return {}

"""GPTQ (Frantar et al., arXiv 2210.17323): round one column after another, and let the rest make up for the error.

With the Hessian of a layer's squared output error, H = 2 X^T X, of inputs X (rows, in), quantising column q of a weight
changes the columns that are still whole by (equations 2 and 3 of the paper)

    delta = -(w_q - quant(w_q)) / [H_F^-1]_qq * (H_F^-1)_{:,q}

where F are the columns that are left. All inverses that this needs are rows of one upper Cholesky factor of H^-1
(section 3.3, step 3), and the updates of columns outside the block of 128 at hand are done at once (step 2).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

from cotune.compression.calibration import LayerProgress, LayerStatistics, compress_linears
from cotune.compression.grid import Grid
from cotune.errors import InputError
from cotune.models.packed_weights import PackedWeight

_BLOCK_SIZE = 128


@dataclass(frozen=True, kw_only=True)
class Gptq:
    """GPTQ over every linear layer of a model.

    Raises:
        InputError: a damping that is not positive.
    """

    damping: float = 0.01
    """Added to the Hessian's diagonal, as a share of its mean (section 3.3, step 3)."""
    orders_by_activation: bool = False
    """Whether columns go in descending order of their inputs' squares ("act order" of the released code) and not from the
    first to the last. Then the groups' scales come from the weights as they were."""
    needs_texts = True

    def __post_init__(self) -> None:
        if not (math.isfinite(self.damping) and self.damping > 0):
            raise InputError(f"damping is {self.damping}, expected a positive number such as 0.01")

    def quantise_layer(self, weight: Tensor, statistics: LayerStatistics, grid: Grid) -> PackedWeight:
        """Quantise a weight (out, in) for inputs with these statistics.

        A group's scale is fitted when its first column comes up, to the weights as they are by then. Inputs that were
        never other than zero leave their columns to rounding.

        Raises:
            InputError: see `Grid.fit`; or the Hessian cannot be inverted.
        """
        num_in = weight.shape[1]
        size = grid.group_size_of(num_in)
        order = torch.arange(num_in)
        if self.orders_by_activation:
            order = statistics.squared_norms.argsort(descending=True, stable=True)
        factor = inverse_factor(statistics.gram[order][:, order], self.damping)
        left = weight.double()[:, order]
        codes = torch.empty_like(left)
        scales, zeros = grid.fit(weight)
        for start in range(0, num_in, _BLOCK_SIZE):
            end = min(start + _BLOCK_SIZE, num_in)
            errors = torch.empty_like(left[:, start:end])
            for i in range(start, end):
                group = int(order[i]) // size
                if i % size == 0 and i > 0 and not self.orders_by_activation:
                    fitted = grid.fit(left[:, i : i + size])
                    scales[:, group], zeros[:, group] = fitted[0][:, 0], fitted[1][:, 0]
                scale, zero = scales[:, group], zeros[:, group]
                codes[:, i] = grid.codes(left[:, i], scale, zero)
                error = (left[:, i] - scale * (codes[:, i] - zero)) / factor[i, i]
                left[:, i:end] -= error[:, None] * factor[i, i:end]
                errors[:, i - start] = error
            left[:, end:] -= errors @ factor[start:end, end:]
        in_place = torch.empty_like(codes)
        in_place[:, order] = codes
        return grid.pack(in_place, scales, zeros)

    def quantise_linears(
        self,
        model: PreTrainedModel,
        input_ids: NDArray[np.int64],
        grid: Grid,
        *,
        skip: Collection[str] = (),
        batch_size: int = 4,
        on_layer: Callable[[LayerProgress], None] | None = None,
    ) -> dict[str, PackedWeight]:
        """See `Quantiser`."""

        def compress_layer(weight: Tensor, statistics: LayerStatistics) -> PackedWeight:
            return self.quantise_layer(weight, statistics, grid)

        return compress_linears(model, input_ids, compress_layer, skip=skip, batch_size=batch_size, on_layer=on_layer)


def inverse_factor(gram: Tensor, damping: float) -> Tensor:
    """The upper Cholesky factor U of H^-1 = U^T U, for the damped H = 2 X^T X.

    Args:
        gram: X^T X, float64 (in, in).
        damping: as in `Gptq`.

    Raises:
        InputError: H is not positive definite.
    """
    hessian = 2 * gram
    diagonal = hessian.diagonal()
    hessian = hessian + torch.diag(torch.where(diagonal == 0, 1.0, 0.0) + damping * diagonal.mean())
    lower, failed = torch.linalg.cholesky_ex(hessian)
    if failed:
        raise InputError(
            f"the Hessian with damping {damping} has no inverse; take a larger damping, or more calibration texts"
        )
    return torch.linalg.cholesky(torch.cholesky_inverse(lower), upper=True)

"""Round-to-nearest: each weight becomes the nearest number of its group's grid, whatever the layer reads."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

from cotune.compression.calibration import LayerProgress, LayerStatistics, compress_linears, compress_weights
from cotune.compression.grid import Grid
from cotune.models.packed_weights import PackedWeight


def round_to_nearest(weight: Tensor, grid: Grid) -> PackedWeight:
    """Quantise a weight (out, in): code = clamp(round(w / scale) + zero, 0, 2**bits - 1).

    Halves go to the even code, as everywhere in PyTorch and NumPy.

    Raises:
        InputError: see `Grid.fit`.

    Example:
        >>> import torch
        >>> round_to_nearest(torch.tensor([[-1.0, 0.6, 2.5]]), Grid(bits=3)).dequantised()
        array([[-1. ,  0.5,  2.5]], dtype=float32)
    """
    scales, zeros = grid.fit(weight)
    num_in = weight.shape[1]
    return grid.pack(grid.codes(weight, grid.spread(scales, num_in), grid.spread(zeros, num_in)), scales, zeros)


@dataclass(frozen=True, kw_only=True)
class RoundToNearest:
    """Quantise every linear layer of a model by itself. The yardstick that others are held against."""

    def quantise_layer(self, weight: Tensor, statistics: LayerStatistics, grid: Grid) -> PackedWeight:
        """As `round_to_nearest`, whatever the layer reads."""
        return round_to_nearest(weight, grid)

    def quantise_linears(
        self,
        model: PreTrainedModel,
        input_ids: NDArray[np.int64] | None,
        grid: Grid,
        *,
        skip: Collection[str] = (),
        batch_size: int = 4,
        on_layer: Callable[[LayerProgress], None] | None = None,
    ) -> dict[str, PackedWeight]:
        """See `Quantiser`. Texts only serve to say what each layer loses."""
        if input_ids is None:
            return compress_weights(model, lambda weight: round_to_nearest(weight, grid), skip=skip, on_layer=on_layer)

        def compress_layer(weight: Tensor, statistics: LayerStatistics) -> PackedWeight:
            return self.quantise_layer(weight, statistics, grid)

        return compress_linears(model, input_ids, compress_layer, skip=skip, batch_size=batch_size, on_layer=on_layer)

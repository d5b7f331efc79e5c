"""Depth: blocks that change the residual stream least are dropped (ShortGPT, Men et al., arXiv 2403.03853)."""

from __future__ import annotations

from collections.abc import Callable, Collection
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from cotune.compression.calibration import LayerProgress, check_walk
from cotune.compression.fewer_layers import drop_blocks
from cotune.compression.pruner import Amount, Facts, count_of, refuse_skip, texts_of
from cotune.errors import InputError
from cotune.models.anatomy import decoder_layers


@torch.no_grad()
def block_influence(model: PreTrainedModel, input_ids: NDArray[np.int64], *, batch_size: int = 4) -> list[float]:
    """How much each block turns the residual stream, first to last.

    Equation 1 of the paper: BI_i = 1 - mean over tokens of cos(x_i, x_{i+1}), of a block's input and output.

    Args:
        model: of any architecture, in evaluation mode; as before afterwards.
        input_ids: int64 (num_texts, length), as in `CalibrationTexts`.
        batch_size: texts in one pass.

    Raises:
        InputError: token ids or a model that cannot be used.

    Example:
        >>> block_influence(model, texts.input_ids)  # doctest: +SKIP
        [0.842, 0.088, 0.078, 0.053]
    """
    check_walk(model, input_ids, batch_size=batch_size)
    layers = decoder_layers(model)
    cosines = np.zeros(len(layers))

    def watch(index: int) -> Callable[[nn.Module, tuple[Any, ...], Tensor], None]:
        def add(module: nn.Module, arguments: tuple[Any, ...], output: Tensor) -> None:
            cosines[index] += float(F.cosine_similarity(arguments[0].double(), output.double(), dim=-1).sum())

        return add

    with ExitStack() as stack:
        for index, layer in enumerate(layers):
            stack.callback(layer.register_forward_hook(watch(index)).remove)
        for ids in torch.split(torch.from_numpy(input_ids), batch_size):
            model.base_model(input_ids=ids.to(model.device), use_cache=False)
    influence: list[float] = (1 - cosines / input_ids.size).tolist()
    return influence


def lowest_blocks(influence: Collection[float], num: int) -> list[int]:
    """The `num` blocks with the lowest influence, in order; of equal ones the first.

    Example:
        >>> lowest_blocks([0.8, 0.1, 0.3, 0.1], 2)
        [1, 3]
    """
    ranked = sorted(enumerate(influence), key=lambda pair: (pair[1], pair[0]))
    return sorted(index for index, _ in ranked[:num])


@dataclass(frozen=True, kw_only=True)
class Depth:
    """`drop_blocks` of those with the lowest influence."""

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
        """See `Pruner`. `amount` is a number of blocks; `on_layer` is not called."""
        refuse_skip(skip)
        num, ids = count_of(amount), texts_of(input_ids)
        num_blocks = len(decoder_layers(model))
        if num >= num_blocks:
            raise InputError(f"{num} blocks are to go, expected 1 to {num_blocks - 1}: the model has {num_blocks}")
        influence = block_influence(model, ids, batch_size=batch_size)
        dropped = lowest_blocks(influence, num)
        drop_blocks(model, dropped)
        return {"block_influence": influence, "dropped_blocks": dropped}

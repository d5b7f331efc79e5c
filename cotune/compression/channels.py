"""Feed-forward width: channels of a SwiGLU that add least to the residual stream go, the same number in every block.

A channel c adds a_c D_:c, with its activation a_c = silu(G_c x) * U_c x. Its importance is the sum of squares of that
over the calibration tokens, ||D_:c||^2 sum a_c^2, which is Wanda's score (arXiv 2306.11695) for a whole column, as in
FLAP (arXiv 2312.11983) without its subtraction of means. `refit` repairs D.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

from cotune.compression.calibration import LayerProgress, LayerStatistics, reconstruction_error, walk_blocks
from cotune.compression.llama_blocks import MULTIPLE, keep_rows, kept_size, llama_blocks, most_important, set_weight
from cotune.compression.pruner import Amount, Facts, refuse_skip, share_of, texts_of
from cotune.compression.refit import DAMPING, refit
from cotune.errors import InputError


def slice_channels(
    model: PreTrainedModel,
    input_ids: NDArray[np.int64],
    num_kept: int,
    *,
    repairs: bool = True,
    damping: float = DAMPING,
    batch_size: int = 4,
    on_layer: Callable[[LayerProgress], None] | None = None,
) -> None:
    """Keep the `num_kept` most important channels of every block, in place and in their order.

    Args:
        model: of Llama's form; `intermediate_size` of its config becomes `num_kept`.
        input_ids: int64 (num_texts, length), as in `CalibrationTexts`.
        num_kept: channels, 1 to the number there are.
        repairs: whether the channels that stay make up for those that go; see `refit`.
        damping: of that.
        batch_size: texts that go through a block at once.
        on_layer: called after each block, with the name of its `down_proj`.

    Raises:
        InputError: another architecture, too many channels, or texts that cannot be used.

    Example:
        >>> slice_channels(model, texts.input_ids, 512)  # doctest: +SKIP
    """
    blocks = {block.name: block for block in llama_blocks(model)}
    num_channels = int(model.config.intermediate_size)
    if not 1 <= num_kept <= num_channels:
        raise InputError(f"num_kept is {num_kept}, expected 1 to {num_channels}, the channels of a block")
    for walked in walk_blocks(model, input_ids, batch_size=batch_size):
        block = blocks[walked.name]
        name = next(name for name, linear in walked.linears.items() if linear is block.down)
        statistics = walked.statistics([name])[name]
        weight = block.down.weight.detach()
        kept = most_important(column_importance(weight, statistics), num_kept)
        new = refit(weight, statistics.gram, kept, damping=damping) if repairs else weight[:, kept]
        error = lost_share(weight, new, kept, statistics)
        set_weight(block.down, new)
        keep_rows([block.gate, block.up], kept)
        if on_layer is not None:
            on_layer(LayerProgress(name=name, index=walked.index, num_layers=len(blocks), error=error))
    model.config.intermediate_size = num_kept


def column_importance(weight: Tensor, statistics: LayerStatistics) -> Tensor:
    """||W_:c||^2 ||X_c||^2 of each input c, float64 (in,): what it adds to the squared outputs if alone."""
    return weight.double().square().sum(0) * statistics.squared_norms


def lost_share(weight: Tensor, new: Tensor, kept: Tensor, statistics: LayerStatistics) -> float:
    """Share of a layer's squared output that is lost with a weight (out, kept) of the inputs `kept` alone."""
    spread = weight.new_zeros(weight.shape)
    spread[:, kept] = new
    return reconstruction_error(weight, spread, statistics.gram)


@dataclass(frozen=True, kw_only=True)
class Channels:
    """`slice_channels` by a share of the channels."""

    repairs: bool = True
    """Whether those that stay make up for those that go."""
    damping: float = DAMPING
    """Of that, see `refit`."""
    multiple: int = MULTIPLE
    """The new number is a multiple of this."""

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
        """See `Pruner`. `amount` is a share."""
        refuse_skip(skip)
        share, ids = share_of(amount), texts_of(input_ids)
        llama_blocks(model)
        num_kept = kept_size(int(model.config.intermediate_size), share, multiple=self.multiple)
        slice_channels(
            model,
            ids,
            num_kept,
            repairs=self.repairs,
            damping=self.damping,
            batch_size=batch_size,
            on_layer=on_layer,
        )
        return {"intermediate_size": num_kept}

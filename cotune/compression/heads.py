"""Attention width: whole key-value heads go with the query heads that read them, the same number in every block.

Heads of one group share keys and values (grouped-query attention, arXiv 2305.13245), so that a group is the least that
makes the cache of keys and values smaller. Its importance is what its columns of the output projection add to the
residual stream, as in `channels`; `refit` repairs that projection. Heads keep their dimension.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

from cotune.compression.calibration import LayerProgress, walk_blocks
from cotune.compression.channels import column_importance, lost_share
from cotune.compression.llama_blocks import keep_rows, kept_size, llama_blocks, most_important, set_weight
from cotune.compression.pruner import Amount, Facts, refuse_skip, share_of, texts_of
from cotune.compression.refit import DAMPING, refit
from cotune.errors import InputError
from cotune.models.anatomy import attention_shape


def slice_heads(
    model: PreTrainedModel,
    input_ids: NDArray[np.int64],
    num_kept: int,
    *,
    repairs: bool = True,
    damping: float = DAMPING,
    batch_size: int = 4,
    on_layer: Callable[[LayerProgress], None] | None = None,
) -> None:
    """Keep the `num_kept` most important key-value heads of every block with their query heads, in place.

    Args:
        model: of Llama's form; its config gets the new numbers of heads and the old dimension of a head.
        input_ids: int64 (num_texts, length), as in `CalibrationTexts`.
        num_kept: key-value heads, 1 to the number there are; see `check_heads`.
        repairs: whether the heads that stay make up for those that go; see `refit`.
        damping: of that.
        batch_size: texts that go through a block at once.
        on_layer: called after each block, with the name of its `o_proj`.

    Raises:
        InputError: another architecture, a number of heads that does not go, or texts that cannot be used.

    Example:
        >>> slice_heads(model, texts.input_ids, 2)  # doctest: +SKIP
    """
    blocks = {block.name: block for block in llama_blocks(model)}
    heads, kv_heads, head_dim = attention_shape(model)
    check_heads(model, num_kept)
    group = heads // kv_heads
    for walked in walk_blocks(model, input_ids, batch_size=batch_size):
        block = blocks[walked.name]
        name = next(name for name, linear in walked.linears.items() if linear is block.output)
        statistics = walked.statistics([name])[name]
        weight = block.output.weight.detach()
        by_group = column_importance(weight, statistics).view(kv_heads, group * head_dim).sum(1)
        kept = most_important(by_group, num_kept)
        columns = _places(kept, group * head_dim)
        new = refit(weight, statistics.gram, columns, damping=damping) if repairs else weight[:, columns]
        error = lost_share(weight, new, columns, statistics)
        set_weight(block.output, new)
        keep_rows([block.query], columns)
        keep_rows([block.key, block.value], _places(kept, head_dim))
        if on_layer is not None:
            on_layer(LayerProgress(name=name, index=walked.index, num_layers=len(blocks), error=error))
    config = model.config
    config.head_dim = head_dim
    config.num_attention_heads, config.num_key_value_heads = num_kept * group, num_kept


def check_heads(model: PreTrainedModel, num_kept: int) -> None:
    """Raise `InputError` where a model cannot have `num_kept` key-value heads.

    transformers wants the hidden size to be a multiple of the number of heads, also where it does not follow from it.
    """
    heads, kv_heads, _ = attention_shape(model)
    hidden = int(model.config.hidden_size)
    fitting = [num for num in range(1, kv_heads + 1) if hidden % (num * heads // kv_heads) == 0]
    if num_kept not in fitting:
        raise InputError(
            f"{num_kept} key-value heads are to stay, expected {' or '.join(map(str, fitting))}: the hidden size of "
            f"{hidden} must be a multiple of the number of heads"
        )


def _places(kept: Tensor, size: int) -> Tensor:
    """Indices of all rows of the groups `kept`, of `size` rows each."""
    return (kept[:, None] * size + torch.arange(size, device=kept.device)).flatten()


@dataclass(frozen=True, kw_only=True)
class Heads:
    """`slice_heads` by a share of the key-value heads."""

    repairs: bool = True
    """Whether those that stay make up for those that go."""
    damping: float = DAMPING
    """Of that, see `refit`."""

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
        _, kv_heads, _ = attention_shape(model)
        num_kept = kept_size(kv_heads, share, multiple=1)
        slice_heads(
            model,
            ids,
            num_kept,
            repairs=self.repairs,
            damping=self.damping,
            batch_size=batch_size,
            on_layer=on_layer,
        )
        return {"num_attention_heads": int(model.config.num_attention_heads), "num_key_value_heads": num_kept}

"""How many tokens' keys and values fit into the memory that is free."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import torch

from cotune.models.anatomy import attention_shape
from cotune.models.kv_pool import BLOCK_SIZE

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Shares of the memory that is free after the weights: a GPU does nothing else, a computer does.
_GPU_SHARE = 0.8
_CPU_SHARE = 0.25


def kv_bytes_per_token(model: PreTrainedModel) -> int:
    """Bytes of one token's keys and values in all layers, on this rank."""
    _, kv_heads, head_dim = attention_shape(model)
    layers = int(model.config.get_text_config().num_hidden_layers)
    return int(2 * layers * kv_heads * head_dim * model.dtype.itemsize)


def blocks_that_fit(model: PreTrainedModel, *, most_tokens: int) -> int:
    """Blocks for which there is memory now, at least one.

    Args:
        model: on its device.
        most_tokens: more than these are of no use.
    """
    if model.device.type == "cuda":
        free_bytes = _GPU_SHARE * torch.cuda.mem_get_info(model.device)[0]
    else:
        free_bytes = _CPU_SHARE * os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    num_tokens = min(most_tokens, int(free_bytes) // kv_bytes_per_token(model))
    return max(1, num_tokens // BLOCK_SIZE)

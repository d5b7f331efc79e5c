"""Layers in parts: what a rank keeps, and which numbers of ranks fit."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import GPT2Config, LlamaConfig

from cotune.errors import InputError
from cotune.models.shards import _Joined, _OwnTokens, _Summed, check_ranks


def test_ranks_must_divide_the_heads() -> None:
    config = LlamaConfig(num_attention_heads=8, num_key_value_heads=4)
    for num_ranks in (1, 2, 4):
        check_ranks(config, num_ranks)
    for num_ranks in (3, 8):
        with pytest.raises(InputError, match=rf"^{num_ranks} ranks came, .* 8 heads and 4 key-value heads: 1, 2 or 4$"):
            check_ranks(config, num_ranks)


def test_a_model_without_a_plan_is_refused() -> None:
    with pytest.raises(InputError, match=r"gpt2 has no tensor parallel plan .* --device-map auto"):
        check_ranks(GPT2Config(), 2)


def test_sums_are_in_the_order_of_ranks_and_in_float32() -> None:
    parts = torch.tensor([[1.0], [2.0**-8], [2.0**-8]], dtype=torch.bfloat16)
    total = _Summed(lambda own: parts.clone(), torch.tensor([0.5], dtype=torch.bfloat16))(nn.Identity(), (), parts[0])
    # In bfloat16, 1 + 2^-8 would be 1 again, twice.
    assert total.item() == 1.5 + 2.0**-7


def test_joined_parts_lose_their_padding() -> None:
    parts = torch.arange(8.0).reshape(2, 1, 4)
    joined = _Joined(lambda own: parts, 7)(nn.Identity(), (), parts[0])
    assert joined.tolist() == [[0, 1, 2, 3, 4, 5, 6]]


def test_each_token_is_looked_up_by_one_rank() -> None:
    whole = nn.Embedding(6, 2).requires_grad_(False)
    ids = torch.tensor([[0, 2, 3, 5]])
    halves = []
    for rank in (0, 1):
        own = nn.Embedding.from_pretrained(whole.weight[3 * rank : 3 * rank + 3])
        halves.append(_OwnTokens(own.forward, own, 3 * rank)(ids))
    assert torch.equal(halves[0] + halves[1], whole(ids))

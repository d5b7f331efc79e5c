"""Parts of blocks, and sizes."""

from __future__ import annotations

import pytest
import torch
from compressible import tiny_model
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from cotune.compression.llama_blocks import keep_rows, kept_size, llama_blocks, most_important, set_weight
from cotune.errors import InputError


def test_parts_are_found_by_name() -> None:
    model = tiny_model()
    blocks = llama_blocks(model)
    assert [block.name for block in blocks] == [f"model.layers.{i}" for i in range(3)]
    layer = model.model.layers[1]
    assert blocks[1].writers == (layer.self_attn.o_proj, layer.mlp.down_proj)
    assert list(blocks[1].readers) == [layer.input_layernorm, layer.post_attention_layernorm]
    assert blocks[1].readers[layer.post_attention_layernorm] == (layer.mlp.gate_proj, layer.mlp.up_proj)


def test_other_architectures_are_refused() -> None:
    model = GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=1, n_head=1, n_positions=8, vocab_size=9))
    with pytest.raises(InputError, match="GPT2LMHeadModel cannot be made narrower"):
        llama_blocks(model)


def test_rows_go_with_their_biases() -> None:
    linear = nn.Linear(3, 4)
    weight, bias = linear.weight.detach().clone(), linear.bias.detach().clone()
    linear.weight.requires_grad_(False)
    keep_rows([linear], torch.tensor([1, 3]))
    assert torch.equal(linear.weight, weight[[1, 3]]) and torch.equal(linear.bias, bias[[1, 3]])
    assert (linear.out_features, linear.in_features) == (2, 3)
    assert not linear.weight.requires_grad and linear.bias.requires_grad
    set_weight(linear, weight[:2, :1].double())
    assert linear.in_features == 1 and linear.weight.dtype == torch.float32 and linear.weight.is_contiguous()


def test_sizes_are_multiples_by_hand() -> None:
    sizes = [kept_size(704, share, multiple=32) for share in (0.25, 0.5, 0.9, 0.99)]
    assert sizes == [544, 352, 64, 32]
    assert kept_size(3, 0.5, multiple=1) == 2
    with pytest.raises(InputError, match=r"0.25 of 32 in steps of 32 leaves all, expected at least 0.5"):
        kept_size(32, 0.25, multiple=32)


def test_of_equal_importance_the_first_stay() -> None:
    assert most_important(torch.tensor([1.0, 2.0, 1.0, 1.0]), 3).tolist() == [0, 1, 2]

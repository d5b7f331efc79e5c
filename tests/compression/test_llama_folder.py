"""Folders of the Llama family are read tensor by tensor; others are refused by name before anything is written."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from llama_folders import random_llama, save_llama
from safetensors.torch import load_file, save_file
from tiny_models import ARCHITECTURES, tokenizer_json
from transformers import AutoConfig, AutoModelForCausalLM

from cotune.compression.llama_folder import LlamaFolder
from cotune.errors import InputError


def change_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_bytes()), **changes}))


def test_a_folder_s_shape_and_tensors(tmp_path: Path) -> None:
    model = save_llama(tmp_path, attention_bias=True)
    folder = LlamaFolder(tmp_path)
    shape = folder.shape
    assert (shape.num_layers, shape.num_heads, shape.num_kv_heads, shape.head_dim) == (2, 4, 2, 16)
    assert (shape.hidden_size, shape.mlp_width, shape.vocab_size, shape.context) == (32, 48, 400, 64)
    assert (shape.end_ids, shape.bos_id, shape.is_tied) == ((1,), 0, False)
    np.testing.assert_allclose(shape.rope_frequencies, 10000.0 ** -(np.arange(8) / 8), rtol=1e-6)
    for name, parameter in model.named_parameters():
        assert folder.has(name)
        np.testing.assert_array_equal(folder.whole(name), parameter.numpy())
    assert not folder.has("model.layers.0.mlp.up_proj.bias")
    assert LlamaFolder(tmp_path, context=9).shape.context == 9


def test_a_folder_in_several_files_is_read_too(tmp_path: Path) -> None:
    model = random_llama()
    model.save_pretrained(tmp_path, max_shard_size="10KB")
    (tmp_path / "tokenizer.json").write_bytes(tokenizer_json())
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    name = "model.layers.1.mlp.down_proj.weight"
    np.testing.assert_array_equal(LlamaFolder(tmp_path).whole(name), model.get_parameter(name).numpy())


def test_half_precision_is_read_as_float32(tmp_path: Path) -> None:
    model = random_llama().to(torch.bfloat16)
    model.save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_bytes(tokenizer_json())
    found = LlamaFolder(tmp_path).whole("model.norm.weight")
    np.testing.assert_array_equal(found, model.model.norm.weight.float().numpy())
    assert found.dtype == np.float32


def test_all_ends_of_a_text_are_known(tmp_path: Path) -> None:
    save_llama(tmp_path)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [1, 7]}')
    assert LlamaFolder(tmp_path).shape.end_ids == (1, 7)


def test_another_architecture_is_refused_by_name(tmp_path: Path) -> None:
    AutoModelForCausalLM.from_config(AutoConfig.for_model("gpt2", **ARCHITECTURES["gpt2"])).save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_bytes(tokenizer_json())
    with pytest.raises(InputError, match="is a GPT2LMHeadModel, which cannot be exported; expected one of Llama"):
        LlamaFolder(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_act": "gelu"}, "has hidden_act 'gelu', expected 'silu'"),
        (
            {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 100.0, "factor": 2.0}},
            "a rotary embedding of type 'dynamic', which changes with the length of the text",
        ),
        ({"num_hidden_layers": 3}, "lacks the tensor model.layers.2.input_layernorm.weight"),
        ({"num_hidden_layers": 1}, "has the tensor model.layers.1.input_layernorm.weight, which .* has no place for"),
    ],
)
def test_what_the_graph_does_not_know_is_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    save_llama(tmp_path)
    change_config(tmp_path, **changes)
    with pytest.raises(InputError, match=message):
        LlamaFolder(tmp_path)


def test_a_window_shorter_than_the_context_is_refused(tmp_path: Path) -> None:
    save_llama(tmp_path, "mistral", sliding_window=32)
    with pytest.raises(InputError, match="sees 32 tokens at a time and context is 64, expected at most 32"):
        LlamaFolder(tmp_path)
    assert LlamaFolder(tmp_path, context=32).shape.context == 32


@pytest.mark.parametrize("context", [0, 65])
def test_a_context_that_the_model_has_not_is_refused(context: int, tmp_path: Path) -> None:
    save_llama(tmp_path)
    with pytest.raises(InputError, match=f"context is {context}, expected 1 to 64"):
        LlamaFolder(tmp_path, context=context)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def widen(path: Path) -> None:
    tensors = load_file(path)
    tensors["model.norm.weight"] = torch.ones(33)
    save_file(tensors, path, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("damage", "message"),
    [(cut, "is no safetensors file"), (widen, r"model.norm.weight .* has shape \(33,\), expected \(32,\)")],
)
def test_damaged_weights_are_refused(damage: Callable[[Path], None], message: str, tmp_path: Path) -> None:
    save_llama(tmp_path)
    damage(tmp_path / "model.safetensors")
    with pytest.raises(InputError, match=message):
        LlamaFolder(tmp_path).whole("model.norm.weight")


def test_a_damaged_config_is_refused(tmp_path: Path) -> None:
    save_llama(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(InputError, match=r"config\.json in .* cannot be read"):
        LlamaFolder(tmp_path)

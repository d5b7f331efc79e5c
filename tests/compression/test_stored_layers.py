"""What is said of a folder is what lies in it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from llama_folders import save_llama

from cotune.compression.quantise import quantise
from cotune.compression.quantised_folder import save_quantised
from cotune.compression.stored_layers import folder_bytes, stored_layers, stored_tensors
from cotune.errors import InputError

UP = "model.layers.0.mlp.up_proj.weight"


def test_whole_weights(tmp_path: Path) -> None:
    model = save_llama(tmp_path / "m")
    with torch.no_grad():
        model.get_parameter(UP)[:24] = 0
    model.to(torch.bfloat16).save_pretrained(tmp_path / "m")
    layers = {layer.name: layer for layer in stored_layers(tmp_path / "m")}
    assert sum(layer.num_numbers for layer in layers.values()) == model.num_parameters()
    assert layers[UP].sparsity == 0.5 and layers[UP].bits == 16 == layers[UP].code_bits and layers[UP].shape == (48, 32)
    (tmp_path / "m" / "projections.safetensors").write_bytes(bytes(99))
    assert folder_bytes(tmp_path / "m") == (tmp_path / "m" / "model.safetensors").stat().st_size


def test_packed_weights(tmp_path: Path) -> None:
    model = save_llama(tmp_path / "m")
    report = quantise(model, "rtn", bits=4, group_size=32)
    save_quantised(tmp_path / "q", model, report.packed, method="rtn", source=str(tmp_path / "m"))
    layers = {layer.name: layer for layer in stored_layers(tmp_path / "q")}
    # Of 32 weights: 32 codes, a scale of 16 bits, and a zero point, which has a byte of its own in a row of one group.
    assert layers[UP].code_bits == 4 and layers[UP].bits == 4 + (16 + 8) / 32
    assert layers[UP].sparsity == int((model.get_parameter(UP) == 0).sum()) / (48 * 32) > 0
    assert sum(layer.num_numbers for layer in layers.values()) == model.num_parameters()


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    save_llama(tmp_path / "m")
    (tmp_path / "m" / "model.safetensors").write_bytes(b"\xff" * 40)
    with pytest.raises(InputError, match=r"model.safetensors is no safetensors file"):
        stored_tensors(tmp_path / "m")

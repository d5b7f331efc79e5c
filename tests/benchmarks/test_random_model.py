"""A random folder is a model like any other, of the shape that was asked for, and is written a piece at a time."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import random_model
import torch
from model_shapes import named_config, num_parameters
from random_model import write_random_folder
from transformers import AutoConfig, PreTrainedConfig

from cotune.errors import InputError
from cotune.models.weights import load_model


def config(**changes: object) -> PreTrainedConfig:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    made: PreTrainedConfig = AutoConfig.for_model("llama", vocab_size=2048, num_key_value_heads=1, **sizes, **changes)
    return made


@pytest.mark.parametrize("tied", [False, True])
def test_it_loads_with_random_weights_and_plain_norms(
    tied: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(random_model, "_NUMBERS_AT_A_TIME", 1000)
    shape = config(tie_word_embeddings=tied, attention_bias=True)
    write_random_folder(tmp_path / "model", shape, seed=3)
    model = load_model(tmp_path / "model", dtype="bfloat16", device="cpu").requires_grad_(False)
    assert sum(p.numel() for p in model.parameters()) == num_parameters(shape)
    tensors = dict(model.named_parameters())
    assert ("lm_head.weight" in tensors) != tied
    for name, tensor in tensors.items():
        if name.endswith("bias"):
            assert not tensor.any()
        elif tensor.ndim == 1:
            assert bool((tensor == 1).all())
        else:
            assert 0.018 < float(tensor.float().std()) < 0.022 and abs(float(tensor.float().mean())) < 0.002
    q, k = (tensors[f"model.layers.0.self_attn.{one}_proj.weight"] for one in "qk")
    assert not torch.equal(q[:16], k)
    write_random_folder(tmp_path / "again", shape, seed=3)
    write_random_folder(tmp_path / "other", shape, seed=4)
    same, other = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("again", "other"))
    assert (tmp_path / "model" / "model.safetensors").read_bytes() == same != other


def test_no_tensor_is_ever_whole_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    longest = []
    pieces = random_model._pieces

    def watched(*arguments: object) -> object:
        for piece in pieces(*arguments):  # type: ignore[arg-type]
            longest.append(piece.numel())
            yield piece

    monkeypatch.setattr(random_model, "_NUMBERS_AT_A_TIME", 1000)
    monkeypatch.setattr(random_model, "_pieces", watched)
    write_random_folder(tmp_path / "model", config())
    assert max(longest) == 1000 and sum(longest) == num_parameters(config())


def test_a_folder_that_is_there_is_left_alone(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is there already"):
        write_random_folder(tmp_path, config())


def test_the_shapes_of_devices_have_the_sizes_that_they_are_called_by() -> None:
    sizes = {name: num_parameters(named_config(name)) / 1e6 for name in ("1m", "25m", "151m", "600m")}
    assert sizes == {name: pytest.approx(float(name[:-1]), rel=0.05) for name in sizes}
    # What the prototype was measured with.
    shape = named_config("151m")
    assert (shape.hidden_size, shape.num_hidden_layers, shape.vocab_size) == (768, 16, 32_768)
    assert np.isclose(sizes["151m"], 151.0, atol=0.1)

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from cotune.errors import InputError
from cotune.models.backbone import Backbone
from cotune.models.peft_adapter import PeftAdapter
from cotune.tuning.p_tuning import PTuning


def test_the_encoder_is_trained_and_the_prompt_is_saved(tmp_path: Path, backbone: Backbone) -> None:
    adapter = PTuning(num_virtual_tokens=4).fresh(backbone, (), seed=0)
    # Embeddings and an MLP of three layers, all of width 16.
    assert adapter.num_parameters == 4 * 16 + 3 * (16 * 16 + 16)
    adapter.save(tmp_path, backbone.model)
    assert {n: t.shape for n, t in load_file(tmp_path / "adapter_model.safetensors").items()} == {
        "prompt_embeddings": (4, 16)
    }
    again = PeftAdapter.load(tmp_path, backbone.model)
    assert again.num_parameters == 4 * 16
    ids = torch.arange(3, 9)[None]
    with torch.no_grad(), adapter.attach(backbone.model) as model:
        expected = model(input_ids=ids).logits
    with torch.no_grad(), again.attach(backbone.model) as model:
        assert torch.equal(model(input_ids=ids).logits, expected)


def test_an_empty_prompt_is_refused() -> None:
    with pytest.raises(InputError, match="num_virtual_tokens is 0"):
        PTuning(num_virtual_tokens=0)

"""Mamba-2 of transformers as a device's recurrent model: what co-tuning asks of it."""

from __future__ import annotations

from pathlib import Path

import peft
import pytest
import torch
from device_models import device_model
from transformers import AutoModelForCausalLM, PreTrainedModel

from cotune.models.peft_adapter import PeftAdapter


@pytest.fixture
def model() -> PreTrainedModel:
    return device_model("mamba2", vocab_size=64)


def ids_of(*shape: int) -> torch.Tensor:
    return torch.randint(3, 64, shape, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def test_it_is_a_plain_folder(model: PreTrainedModel, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=False).eval()
    ids = ids_of(2, 20)
    assert torch.equal(again(input_ids=ids).logits, model(input_ids=ids).logits)
    assert {one.suffix for one in tmp_path.iterdir()} == {".json", ".safetensors"}


@torch.no_grad()
def test_what_stands_behind_changes_nothing(model: PreTrainedModel) -> None:
    """Neither later tokens nor padding on the right, across the chunks of its scan."""
    ids = ids_of(2, 40)
    whole = model(input_ids=ids).logits
    torch.testing.assert_close(model(input_ids=ids[:, :21]).logits, whole[:, :21], rtol=1e-4, atol=1e-5)
    mask = torch.ones_like(ids)
    mask[1, 21:] = 0
    padded = model(input_ids=torch.where(mask == 1, ids, 0), attention_mask=mask).logits
    torch.testing.assert_close(padded[1, :21], whole[1, :21], rtol=1e-4, atol=1e-5)


def test_lora_learns_on_its_input_projection(model: PreTrainedModel) -> None:
    """peft refuses `out_proj` of Mamba models, whose fused kernels would pass it by."""
    ids, before = ids_of(2, 20), {name: value.clone() for name, value in model.state_dict().items()}
    adapter = PeftAdapter.fresh(model, peft.LoraConfig(r=4, target_modules=["in_proj"], init_lora_weights=True))
    assert adapter.num_parameters == 2 * 4 * (32 + 148)
    with adapter.attach(model) as wrapped:
        trained = [one for one in wrapped.parameters() if one.requires_grad]
        optimiser, losses = torch.optim.AdamW(trained, lr=3e-2), []
        for _ in range(8):
            loss = wrapped(input_ids=ids, labels=ids).loss
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    with pytest.raises(ValueError, match="out_proj"):
        PeftAdapter.fresh(model, peft.LoraConfig(r=4, target_modules=["out_proj"]))

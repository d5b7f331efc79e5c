from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from cotune.models.adapters import LoraAdapter, LoraShape, linear_targets
from cotune.models.residual_lora import ResidualLora
from cotune.models.selected import SelectedParameters

IDS = torch.arange(3, 15)[None]


@torch.no_grad()
def logits(model: PreTrainedModel) -> torch.Tensor:
    return model(input_ids=IDS).logits


@pytest.fixture
def model(make_model: Callable[..., PreTrainedModel]) -> PreTrainedModel:
    return make_model("llama").eval().requires_grad_(False)


def random_start(model: PreTrainedModel, shape: LoraShape) -> ResidualLora:
    """A0 and B0 that are anything, and W - s B0 A0."""
    generator = torch.Generator().manual_seed(4)
    fresh = LoraAdapter.fresh(model, shape)
    start = {name: 0.3 * torch.randn(tensor.shape, generator=generator) for name, tensor in fresh.params.items()}
    residual = {}
    for name, weight in model.named_parameters():
        a, b = (start.get(f"base_model.model.{name.removesuffix('.weight')}.lora_{x}.default.weight") for x in "AB")
        if a is not None and b is not None:
            residual[name] = weight - shape.scale * b @ a
    assert len(residual) == 3 * len(shape.targets or linear_targets(model))
    return ResidualLora(adapter=fresh.trained(start), start=start, residual=SelectedParameters(params=residual))


@pytest.mark.parametrize("use_rslora", [False, True])
def test_it_starts_as_the_model_and_becomes_an_ordinary_lora(
    tmp_path: Path, model: PreTrainedModel, use_rslora: bool
) -> None:
    before, own = logits(model), {name: (p.data_ptr(), p.clone()) for name, p in model.named_parameters()}
    lora = random_start(model, LoraShape(rank=3, alpha=5.0, use_rslora=use_rslora))
    with lora.attach(model) as wrapped:
        torch.testing.assert_close(logits(wrapped), before, atol=2e-5, rtol=1e-5)
        assert [n for n, p in wrapped.named_parameters() if p.requires_grad] == list(lora.params)
    trained = {name: tensor + 0.02 for name, tensor in lora.params.items()}
    with ResidualLora(adapter=lora.adapter.trained(trained), start=lora.start, residual=lora.residual).attach(
        model
    ) as wrapped:
        expected = logits(wrapped)
    assert not torch.allclose(expected, before, atol=1e-2)
    plain = lora.trained(trained)
    assert plain.shape.rank == 6 and plain.shape.scale == pytest.approx(lora.adapter.shape.scale)
    with plain.attach(model) as wrapped:
        torch.testing.assert_close(logits(wrapped), expected, atol=5e-5, rtol=1e-4)
    # On disk, and read on the model as it is, and as weights.
    plain.save(tmp_path / "plain", model)
    with LoraAdapter.load(tmp_path / "plain", model).attach(model) as wrapped:
        torch.testing.assert_close(logits(wrapped), expected, atol=5e-5, rtol=1e-4)
    with plain.merge(model).attach(model):
        torch.testing.assert_close(logits(model), expected, atol=5e-5, rtol=1e-4)
    for name, parameter in model.named_parameters():
        assert parameter.data_ptr() == own[name][0] and torch.equal(parameter, own[name][1])


def test_the_two_ranks_stand_one_after_the_other(model: PreTrainedModel) -> None:
    lora = random_start(model, LoraShape(rank=2, targets=("q_proj",)))
    now = {name: tensor * 2 for name, tensor in lora.params.items()}
    plain = lora.trained(now).params
    name_a, name_b = list(plain)[:2]
    assert torch.equal(plain[name_a], torch.cat([now[name_a], lora.start[name_a]]))
    assert torch.equal(plain[name_b], torch.cat([now[name_b], -lora.start[name_b]], dim=1))


def test_saving_writes_the_ordinary_one(tmp_path: Path, model: PreTrainedModel) -> None:
    lora = random_start(model, LoraShape(rank=2, targets=("v_proj",)))
    lora.save(tmp_path, model)
    assert LoraAdapter.load(tmp_path, model).shape == LoraShape(rank=4, alpha=32.0, targets=("v_proj",))
    assert lora.num_parameters == lora.adapter.num_parameters and lora.num_virtual_tokens == 0
    before = logits(model)
    with lora.merge(model).attach(model):
        torch.testing.assert_close(logits(model), before, atol=2e-5, rtol=1e-5)

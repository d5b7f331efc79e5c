"""Terms beside frozen layers: peft computes the same, several add up, and folded they are the same model."""

from __future__ import annotations

import pytest
import torch
from device_models import device_model
from torch import Tensor
from transformers import PreTrainedModel

from cotune.errors import InputError
from cotune.models.adapters import LoraAdapter, LoraShape, linear_sizes
from cotune.models.low_rank_terms import LowRankTerm, fold_low_rank, low_rank_terms

IDS = torch.tensor([[3, 5, 7, 11, 2]])


def term_of(model: PreTrainedModel, rank: int, seed: int) -> dict[str, LowRankTerm]:
    draw = torch.Generator().manual_seed(seed)
    return {
        layer: LowRankTerm(
            0.3 * torch.randn(rank, size_in, generator=draw), 0.3 * torch.randn(size_out, rank, generator=draw)
        )
        for layer, (size_in, size_out) in linear_sizes(model).items()
    }


@torch.no_grad()
def logits_of(model: PreTrainedModel) -> Tensor:
    logits: Tensor = model(input_ids=IDS, use_cache=False).logits
    return logits


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_term_is_what_peft_computes(family: str) -> None:
    model = device_model(family, vocab_size=40)
    adapter = LoraAdapter.fresh(model, LoraShape(rank=2, alpha=3.0))
    term, params = term_of(model, 2, 1), dict(adapter.params)
    for layer, one in term.items():
        params[f"base_model.model.{layer}.lora_A.default.weight"] = one.a
        params[f"base_model.model.{layer}.lora_B.default.weight"] = one.b
    before = logits_of(model)
    with adapter.trained(params).attach(model) as wrapped:
        expected = logits_of(wrapped)
    with low_rank_terms(model, [term], scale=1.5):
        found = logits_of(model)
    assert torch.allclose(found, expected, atol=1e-5) and not torch.allclose(found, before, atol=1e-2)
    assert torch.equal(logits_of(model), before)


@pytest.mark.parametrize("family", ["llama", "gpt2", "mamba2"])
def test_two_terms_of_different_ranks_add_up_and_can_be_folded(family: str) -> None:
    model = device_model(family, vocab_size=40)
    one, other = term_of(model, 2, 1), term_of(model, 3, 2)
    with low_rank_terms(model, [one, other], scale=0.5):
        both = logits_of(model)
    with low_rank_terms(model, [one], scale=0.5):
        alone = logits_of(model)
    fold_low_rank(model, other, scale=0.5)
    with low_rank_terms(model, [one], scale=0.5):
        folded = logits_of(model)
    assert torch.allclose(folded, both, atol=1e-4) and not torch.allclose(alone, both, atol=1e-2)


def test_gradients_reach_the_term_that_learns_and_nothing_else() -> None:
    model = device_model("llama", vocab_size=40).requires_grad_(False)
    frozen, learning = term_of(model, 2, 1), term_of(model, 1, 2)
    for one in learning.values():
        one.a.requires_grad_()
        one.b.requires_grad_()
    with low_rank_terms(model, [frozen, learning], scale=1.0):
        model(input_ids=IDS, use_cache=False).logits.square().sum().backward()
    assert all(one.a.grad is not None and one.b.grad is not None and one.b.grad.any() for one in learning.values())
    assert all(one.a.grad is None for one in frozen.values())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_terms_of_another_model_are_refused() -> None:
    model = device_model("llama", vocab_size=40)
    layer = next(iter(linear_sizes(model)))
    with (
        pytest.raises(InputError, match=r"a term has \(in, out\) \(3, 4\)"),
        low_rank_terms(model, [{layer: LowRankTerm(torch.zeros(1, 3), torch.zeros(4, 1))}], scale=1.0),
    ):
        pass
    with pytest.raises(InputError, match="has none"):
        fold_low_rank(model, {"nowhere": LowRankTerm(torch.zeros(1, 3), torch.zeros(4, 1))}, scale=1.0)

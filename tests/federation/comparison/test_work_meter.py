"""Tokens times parameters against every product that PyTorch computes."""

from __future__ import annotations

import pytest
import torch
from device_models import device_model
from torch.utils.flop_counter import FlopCounterMode

from cotune.federation.comparison.work_meter import WorkMeter, pass_flops


@pytest.mark.parametrize("learns", [True, False])
def test_the_count_is_that_of_all_products_up_to_a_few_per_cent(learns: bool) -> None:
    """A Llama of two layers; what is missing is named in the module's text."""
    model = device_model("llama", vocab_size=64).requires_grad_(learns)
    ids = torch.arange(3 * 7).reshape(3, 7)
    meter = WorkMeter()
    with FlopCounterMode(display=False) as products, meter.counting():
        logits = model(input_ids=ids, use_cache=False).logits
        if learns:
            logits.logsumexp(-1).sum().backward()
    # Norms have parameters and no products; products inside of attention may be in PyTorch's count or not.
    assert meter.flops == pytest.approx(products.get_total_flops(), rel=0.06)


def test_by_hand_with_a_frozen_body_and_nothing_outside() -> None:
    model = device_model("llama", vocab_size=64)
    head = model.get_output_embeddings().weight
    body = sum(one.numel() for one in model.parameters()) - head.numel()
    body -= 0 if model.get_input_embeddings().weight is head else head.numel()
    logits = torch.zeros(5, 64, requires_grad=True)
    forward = 2.0 * (10 * body + 5 * head.numel())
    assert pass_flops(model.requires_grad_(False), 10, logits.detach()) == forward
    assert pass_flops(model, 10, logits) == 2 * forward
    assert pass_flops(model.requires_grad_(True), 10, logits) == 3 * forward
    meter = WorkMeter()
    with meter.counting():
        pass
    model(input_ids=torch.zeros(1, 2, dtype=torch.int64))
    assert meter.flops == 0

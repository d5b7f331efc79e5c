"""Linear layers with packed weights."""

from __future__ import annotations

import torch
from torch import nn

from cotune.models.packed_linear import MIN_ELEMENTS, PackedLinears


def test_packed_layers_compute_the_same() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(256, 300), nn.ReLU(), nn.Linear(300, 256, bias=False), nn.Linear(256, 2))
    assert model[3].weight.numel() < MIN_ELEMENTS
    model.requires_grad_(False)
    packed = PackedLinears(model)
    inputs = torch.randn(5, 256)
    with torch.inference_mode():
        expected = model(inputs)
        with packed.active():
            got = model(inputs)
            alone = model(inputs[:1])
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(alone, expected[:1], atol=1e-4, rtol=1e-4)
    assert "forward" not in model[0].__dict__


def test_other_types_are_left_alone() -> None:
    model = nn.Sequential(nn.Linear(300, 300)).bfloat16().requires_grad_(False)
    with PackedLinears(model).active(), torch.inference_mode():
        assert "forward" not in model[0].__dict__


def test_a_layer_with_another_weight_computes_with_that_one() -> None:
    """As while tuned parameters are attached; with its own again it is packed again."""
    layer = nn.Linear(256, 256).requires_grad_(False)
    packed = PackedLinears(nn.Sequential(layer))
    own, x = layer.weight, torch.ones(4, 256)
    layer.weight = nn.Parameter(own * 2, requires_grad=False)
    with packed.active(), torch.inference_mode():
        torch.testing.assert_close(layer(x), nn.functional.linear(x, own * 2, layer.bias))
        assert "forward" not in layer.__dict__
    layer.weight = own
    with packed.active():
        assert "forward" in layer.__dict__

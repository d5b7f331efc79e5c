from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache

from cotune.data.batches import EncodedExample, pad_batch
from cotune.models.anatomy import decoder_layers
from cotune.models.backbone import Backbone
from cotune.models.selected import SelectedParameters, all_names
from cotune.tuning.answer_loss import answer_nats
from cotune.tuning.gradient_checkpointing import gradient_checkpointing


def gradients(backbone: Backbone, examples: list[EncodedExample], *, enabled: bool) -> dict[str, torch.Tensor]:
    """Of other values than the model's own, which are in it during the forward pass alone."""
    own = SelectedParameters.of(backbone.model, all_names(backbone.model)).params
    leaves = {name: (tensor * 1.1 + 0.01).requires_grad_() for name, tensor in own.items()}
    with gradient_checkpointing(backbone.model, enabled=enabled):
        nats = answer_nats(backbone.model, backbone.model.get_output_embeddings(), leaves, pad_batch(examples, 0))
        return dict(zip(leaves, torch.autograd.grad(nats.mean(), list(leaves.values())), strict=True))


def test_gradients_are_the_same_bit_for_bit(backbone: Backbone, examples: list[EncodedExample]) -> None:
    kept = gradients(backbone, examples, enabled=False)
    again = gradients(backbone, examples, enabled=True)
    assert all(torch.equal(kept[name], again[name]) for name in kept)
    assert all(bool(gradient.any()) for gradient in kept.values() if gradient.ndim == 2)


def test_each_layer_is_computed_twice_and_only_where_gradients_are(
    backbone: Backbone, examples: list[EncodedExample]
) -> None:
    layer, calls = decoder_layers(backbone.model)[0], []
    inner = next(layer.children())
    handle = inner.register_forward_hook(lambda *_: calls.append(1))
    try:
        gradients(backbone, examples, enabled=True)
        assert len(calls) == 2
        with gradient_checkpointing(backbone.model), torch.no_grad():
            backbone.model(input_ids=torch.arange(3, 9)[None])
        assert len(calls) == 3
    finally:
        handle.remove()


def test_a_cache_is_read_the_second_time_as_the_first(backbone: Backbone) -> None:
    """Keys and values in front of the text, with gradients of their own, as in prefix tuning."""

    def gradient(enabled: bool) -> torch.Tensor:
        with torch.no_grad():
            cache = DynamicCache()
            backbone.model(input_ids=torch.arange(3, 6)[None], past_key_values=cache, use_cache=True)
        leaf = cache.layers[0].keys.clone().requires_grad_()
        cache.layers[0].keys = leaf * 1.0
        with gradient_checkpointing(backbone.model, enabled=enabled):
            logits = backbone.model(input_ids=torch.arange(6, 10)[None], past_key_values=cache, use_cache=True).logits
            logits.square().mean().backward()
        assert leaf.grad is not None and bool(leaf.grad.any())
        return leaf.grad

    assert torch.equal(gradient(True), gradient(False))


def test_the_model_comes_back_on_error(backbone: Backbone) -> None:
    with pytest.raises(KeyError), gradient_checkpointing(backbone.model):
        assert all("forward" in layer.__dict__ for layer in decoder_layers(backbone.model))
        raise KeyError
    assert not any("forward" in layer.__dict__ for layer in decoder_layers(backbone.model))

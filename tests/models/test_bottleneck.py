"""Bottleneck adapters on every architecture, against their equation and their count."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from cotune.errors import InputError
from cotune.models import Backbone
from cotune.models.bottleneck import (
    Bottleneck,
    BottleneckAdapter,
    count_parameters,
    output_layers,
    width_for_budget,
)

INPUT = torch.arange(3, 15)[None]


def logits_of(backbone: Backbone) -> torch.Tensor:
    return backbone.forward_states(INPUT).logits


def disturbed(adapter: BottleneckAdapter) -> BottleneckAdapter:
    """The same adapter with a U that is not zero."""
    generator = torch.Generator().manual_seed(7)
    params = {name: t + 0.3 * torch.randn(t.shape, generator=generator) for name, t in adapter.params.items()}
    return BottleneckAdapter(width=adapter.width, params=params)


def test_every_architecture_is_adapted_and_comes_back_unharmed(backbone: Backbone) -> None:
    before = logits_of(backbone)
    modules = {name: id(module) for name, module in backbone.model.named_modules()}
    adapter = BottleneckAdapter.fresh(backbone.model, 2)
    with adapter.attach(backbone.model):
        fresh = logits_of(backbone)
    with disturbed(adapter).attach(backbone.model) as model:
        assert not torch.allclose(logits_of(backbone), before, atol=1e-2)
        trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        assert trainable == adapter.params.keys()
    assert torch.equal(fresh, before), "U is zero: the base model to the last bit"
    assert torch.equal(logits_of(backbone), before)
    assert {name: id(module) for name, module in backbone.model.named_modules()} == modules
    assert not any(parameter.requires_grad for parameter in backbone.model.parameters())
    assert not backbone.model.training


def test_decoding_is_adapted_too(make_model: Callable[..., PreTrainedModel], tokenizer_json: bytes) -> None:
    for architecture in ("llama", "gemma2", "gpt2"):
        backbone = Backbone.from_model(make_model(architecture), tokenizer_json)
        ids = INPUT[0].numpy()
        with disturbed(BottleneckAdapter.fresh(backbone.model, 2)).attach(backbone.model):
            cursor = backbone.cursor()
            cursor.extend(ids[:5])
            steps = [cursor.extend(ids[i : i + 1]).logits for i in range(5, len(ids))]
            torch.testing.assert_close(torch.from_numpy(np.stack(steps)), logits_of(backbone)[0, 5:].float())
        base = backbone.cursor().extend(ids).logits
        assert np.abs(base - steps[-1]).max() > 1e-2


def test_the_model_comes_back_on_error(llama: Backbone) -> None:
    before = logits_of(llama)
    adapter = disturbed(BottleneckAdapter.fresh(llama.model, 2))
    with pytest.raises(KeyError), adapter.attach(llama.model):
        raise KeyError
    assert torch.equal(logits_of(llama), before)


def test_both_halves_of_a_layer_are_changed_as_written(make_model: Callable[..., PreTrainedModel]) -> None:
    model = make_model("llama", num_hidden_layers=1).eval().requires_grad_(False)
    adapter = disturbed(BottleneckAdapter.fresh(model, 3, seed=4))
    layer, base = model.model.layers[0], model.model

    def change(y: torch.Tensor, place: str) -> torch.Tensor:
        d, b_d, u, b_u = (
            adapter.params[f"model.layers.0.{place}.bottleneck.{name}"]
            for name in ("down_weight", "down_bias", "up_weight", "up_bias")
        )
        return y + F.gelu(y @ d.T + b_d) @ u.T + b_u

    y = base.embed_tokens(INPUT)
    angles = base.rotary_emb(y, position_ids=torch.arange(INPUT.shape[1])[None])
    mask = torch.full((INPUT.shape[1], INPUT.shape[1]), float("-inf")).triu(1)[None, None]
    attended = layer.self_attn(layer.input_layernorm(y), position_embeddings=angles, attention_mask=mask)[0]
    h = y + change(attended, "self_attn.o_proj")
    h = h + change(layer.mlp(layer.post_attention_layernorm(h)), "mlp.down_proj")
    expected = model.lm_head(base.norm(h))
    with adapter.attach(model):
        torch.testing.assert_close(model(INPUT).logits, expected)


@pytest.mark.parametrize(
    ("architecture", "expected"),
    [
        ("gemma3_text", ("model.layers.0.self_attn.o_proj", "model.layers.0.mlp.down_proj")),
        ("gpt2", ("transformer.h.0.attn.c_proj", "transformer.h.0.mlp.c_proj")),
    ],
)
def test_two_places_in_each_layer(
    make_model: Callable[..., PreTrainedModel], architecture: str, expected: tuple[str, ...]
) -> None:
    places = output_layers(make_model(architecture))
    assert places[:2] == expected and len(places) == 6


def test_parameters_of_llama_7b() -> None:
    # A bottleneck has 4096 * 48 + 48 + 48 * 4096 + 4096 = 397,360; the paper's table says 0.38 %, 2 * 32 of them.
    assert count_parameters(hidden_size=4096, num_layers=32, width=48) == 64 * 397_360
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(LlamaConfig())
    assert width_for_budget(model, 64 * 397_360) == 48
    assert 100 * 64 * 397_360 / model.num_parameters() == pytest.approx(0.377, abs=5e-4)
    assert sum(p.numel() for p in Bottleneck(40, 7).parameters()) == 2 * 40 * 7 + 47


def test_the_width_follows_the_budget(make_model: Callable[..., PreTrainedModel]) -> None:
    for architecture in ("llama", "gpt2"):
        model = make_model(architecture)
        adapter = BottleneckAdapter.fresh(model, 5)
        assert adapter.num_parameters == count_parameters(hidden_size=24, num_layers=3, width=5)
        assert width_for_budget(model, adapter.num_parameters) == 5
        assert width_for_budget(model, adapter.num_parameters - 1) == 4
    with pytest.raises(InputError, match="at least 438 for"):
        width_for_budget(model, 437)


def test_the_seed_decides_and_the_global_generator_is_left_alone(llama: Backbone) -> None:
    before = torch.get_rng_state()
    first, second, other = (BottleneckAdapter.fresh(llama.model, 2, seed=seed).params for seed in (1, 1, 2))
    with BottleneckAdapter(width=2, params=first).attach(llama.model):
        pass
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)


def test_a_saved_adapter_gives_the_same_logits(tmp_path: Path, backbone: Backbone) -> None:
    adapter = disturbed(BottleneckAdapter.fresh(backbone.model, 3))
    with adapter.attach(backbone.model):
        expected = logits_of(backbone)
    adapter.save(tmp_path / "adapter")
    assert [path.name for path in (tmp_path / "adapter").iterdir()] == ["bottleneck.safetensors"]
    with BottleneckAdapter.load(tmp_path / "adapter", backbone.model).attach(backbone.model):
        assert torch.equal(logits_of(backbone), expected)


@pytest.mark.parametrize("damage", ["no folder", "cut weights", "no metadata", "foreign model"])
def test_folders_that_hold_no_adapter_for_this_model_are_refused(
    tmp_path: Path, llama: Backbone, make_model: Callable[..., PreTrainedModel], damage: str
) -> None:
    from safetensors.torch import save_file

    adapter = BottleneckAdapter.fresh(llama.model, 2)
    adapter.save(tmp_path)
    folder, model, weights = tmp_path, llama.model, tmp_path / "bottleneck.safetensors"
    if damage == "no folder":
        folder = tmp_path / "nowhere"
    elif damage == "cut weights":
        weights.write_bytes(weights.read_bytes()[:100])
    elif damage == "no metadata":
        save_file(adapter.params, weights)
    else:
        model = make_model("gpt2")
    with pytest.raises(InputError):
        BottleneckAdapter.load(folder, model)


def test_impossible_adapters_are_refused(llama: Backbone) -> None:
    with pytest.raises(InputError, match="width is 0"):
        BottleneckAdapter.fresh(llama.model, 0)
    wrong = BottleneckAdapter(width=3, params=BottleneckAdapter.fresh(llama.model, 2).params)
    with pytest.raises(InputError, match="does not fit"), wrong.attach(llama.model):
        pass

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from cotune.errors import InputError
from cotune.models import Backbone
from cotune.models.adapters import LoraAdapter, LoraShape, linear_targets, rank_for_budget

INPUT = torch.arange(3, 15)[None]


def logits_of(backbone: Backbone) -> torch.Tensor:
    return backbone.forward_states(INPUT).logits


def disturbed(adapter: LoraAdapter) -> LoraAdapter:
    """The same adapter with a B that is not zero."""
    return LoraAdapter(shape=adapter.shape, params={name: tensor + 0.1 for name, tensor in adapter.params.items()})


def test_every_architecture_is_adapted_and_comes_back_unharmed(backbone: Backbone) -> None:
    before = logits_of(backbone)
    modules = {name: id(module) for name, module in backbone.model.named_modules()}
    adapter = LoraAdapter.fresh(backbone.model, LoraShape(rank=2))
    with adapter.attach(backbone.model):
        torch.testing.assert_close(logits_of(backbone), before)  # B is zero
    with disturbed(adapter).attach(backbone.model) as wrapped:
        assert not torch.allclose(logits_of(backbone), before, atol=1e-2)
        trainable = [name for name, parameter in wrapped.named_parameters() if parameter.requires_grad]
        assert trainable == list(adapter.params)
    assert torch.equal(logits_of(backbone), before)
    assert {name: id(module) for name, module in backbone.model.named_modules()} == modules
    assert not any(parameter.requires_grad for parameter in backbone.model.parameters())
    assert not backbone.model.training


def test_the_model_comes_back_on_error(llama: Backbone) -> None:
    before = logits_of(llama)
    adapter = disturbed(LoraAdapter.fresh(llama.model, LoraShape(rank=2)))
    with pytest.raises(KeyError), adapter.attach(llama.model):
        raise KeyError
    assert torch.equal(logits_of(llama), before)


@pytest.mark.parametrize(
    ("architecture", "expected"),
    [
        ("llama", ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")),
        ("qwen3", ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")),
        ("gemma", ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")),
        ("gpt2", ("c_attn", "c_proj", "c_fc")),
    ],
)
def test_targets_are_all_linear_layers_but_the_output_embedding(
    make_model: Callable[..., PreTrainedModel], architecture: str, expected: tuple[str, ...]
) -> None:
    model = make_model(architecture)
    assert sorted(linear_targets(model)) == sorted(expected)
    adapter = LoraAdapter.fresh(model, LoraShape(rank=1))
    assert not any("lm_head" in name for name in adapter.params)


def test_the_rank_follows_the_budget(make_model: Callable[..., PreTrainedModel]) -> None:
    # Three layers of width 24 with 4 heads and 2 key-value heads of 8: q (24, 32), k and v (24, 16), o (32, 24),
    # and gate, up and down (24, 40), cost 56 + 40 + 40 + 56 + 3 * 64 = 384 per rank and layer.
    model = make_model("llama")
    assert rank_for_budget(model, 3 * 384 * 5 + 7) == 5
    assert rank_for_budget(model, 3 * 56 * 2, targets=("q_proj",)) == 2
    for rank, targets in ((3, ()), (2, ("v_proj", "down_proj"))):
        adapter = LoraAdapter.fresh(model, LoraShape(rank=rank, targets=targets))
        assert rank_for_budget(model, adapter.num_parameters, targets=targets) == rank
        assert rank_for_budget(model, adapter.num_parameters + 1, targets=targets) == rank
    with pytest.raises(InputError, match="at least 1,152"):
        rank_for_budget(model, 1151)


def test_gpt2_weights_are_counted_and_adapted_the_right_way_round(make_model: Callable[..., PreTrainedModel]) -> None:
    model = make_model("gpt2")
    adapter = LoraAdapter.fresh(model, LoraShape(rank=2))
    assert rank_for_budget(model, adapter.num_parameters) == 2
    shapes = {name.split(".lora_")[1]: tensor.shape for name, tensor in adapter.params.items() if "c_attn" in name}
    assert shapes == {"A.default.weight": (2, 24), "B.default.weight": (72, 2)}


def test_the_seed_decides_and_the_global_generator_is_left_alone(llama: Backbone) -> None:
    before = torch.get_rng_state()
    first, second, other = (LoraAdapter.fresh(llama.model, LoraShape(), seed=seed).params for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)


def test_a_saved_adapter_is_a_peft_folder_and_comes_back(tmp_path: Path, backbone: Backbone) -> None:
    before = logits_of(backbone)
    adapter = disturbed(LoraAdapter.fresh(backbone.model, LoraShape(rank=3, alpha=7.0)))
    with adapter.attach(backbone.model):
        expected = logits_of(backbone)
    adapter.save(tmp_path / "adapter", backbone.model)
    assert {"adapter_config.json", "adapter_model.safetensors"} <= {p.name for p in (tmp_path / "adapter").iterdir()}
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["r"] == 3
    again = LoraAdapter.load(tmp_path / "adapter", backbone.model)
    assert (again.shape.rank, again.shape.alpha) == (3, 7.0)
    with again.attach(backbone.model):
        assert torch.equal(logits_of(backbone), expected)
    assert torch.equal(logits_of(backbone), before)


@pytest.mark.parametrize("shape", [LoraShape(rank=3, use_dora=True), LoraShape(rank=3, use_rslora=True)])
def test_dora_and_rslora_come_back_and_merge(tmp_path: Path, backbone: Backbone, shape: LoraShape) -> None:
    before = logits_of(backbone)
    fresh = LoraAdapter.fresh(backbone.model, shape)
    with fresh.attach(backbone.model):
        torch.testing.assert_close(logits_of(backbone), before)
    adapter = disturbed(fresh)
    adapter.save(tmp_path, backbone.model)
    again = LoraAdapter.load(tmp_path, backbone.model)
    assert (again.shape.use_dora, again.shape.use_rslora) == (shape.use_dora, shape.use_rslora)
    with adapter.attach(backbone.model):
        expected = logits_of(backbone)
    with again.attach(backbone.model):
        assert torch.equal(logits_of(backbone), expected)
    with adapter.merge(backbone.model).attach(backbone.model):
        torch.testing.assert_close(logits_of(backbone), expected, atol=1e-3, rtol=1e-3)


def test_the_equations_of_rslora_and_dora(llama: Backbone) -> None:
    """By hand for one layer: W x + alpha / sqrt(r) B A x, and rows of length m in the direction of W + s B A."""
    layer = "model.layers.0.self_attn.q_proj"
    weight = llama.model.get_submodule(layer).weight
    x = torch.randn(2, weight.shape[1], generator=torch.Generator().manual_seed(0))
    for shape in (LoraShape(rank=4, alpha=6.0, use_rslora=True), LoraShape(rank=4, alpha=6.0, use_dora=True)):
        adapter = disturbed(LoraAdapter.fresh(llama.model, shape))
        a, b = (adapter.params[f"base_model.model.{layer}.lora_{x}.default.weight"] for x in "AB")
        moved = weight + (6.0 / 2 if shape.use_rslora else 6.0 / 4) * b @ a
        if shape.use_dora:
            m = adapter.params[f"base_model.model.{layer}.lora_magnitude_vector.default.weight"]
            moved = moved * (m / moved.norm(dim=1))[:, None]
        with adapter.attach(llama.model), torch.no_grad():
            torch.testing.assert_close(llama.model.get_submodule(layer)(x), x @ moved.T, atol=1e-4, rtol=1e-4)


def test_ranks_that_differ_from_layer_to_layer_are_left_to_the_general_adapter(tmp_path: Path, llama: Backbone) -> None:
    LoraAdapter.fresh(llama.model, LoraShape(rank=2)).save(tmp_path, llama.model)
    path = tmp_path / "adapter_config.json"
    for change in ({"alpha_pattern": {"q_proj": 3}}, {"target_modules": ["model.layers.0.self_attn.q_proj"]}):
        path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
        with pytest.raises(InputError, match=r"read it with PeftAdapter\.load"):
            LoraAdapter.load(tmp_path, llama.model)


@pytest.mark.parametrize("damage", ["no folder", "no config", "cut weights", "foreign model"])
def test_folders_that_hold_no_adapter_for_this_model_are_refused(
    tmp_path: Path, llama: Backbone, make_model: Callable[..., PreTrainedModel], damage: str
) -> None:
    LoraAdapter.fresh(llama.model, LoraShape(rank=2)).save(tmp_path / "adapter", llama.model)
    folder, model = tmp_path / "adapter", llama.model
    if damage == "no folder":
        folder = tmp_path / "nowhere"
    elif damage == "no config":
        (folder / "adapter_config.json").unlink()
    elif damage == "cut weights":
        weights = folder / "adapter_model.safetensors"
        weights.write_bytes(weights.read_bytes()[:100])
    else:
        model = make_model("gpt2")
    with pytest.raises(InputError):
        LoraAdapter.load(folder, model)


def test_impossible_shapes_are_refused(llama: Backbone) -> None:
    with pytest.raises(InputError, match="rank is 0"):
        LoraShape(rank=0)
    with pytest.raises(InputError, match="alpha"):
        LoraShape(alpha=0.0)
    with pytest.raises(InputError, match="c_attn"):
        LoraAdapter.fresh(llama.model, LoraShape(targets=("q_proj", "c_attn")))
    small = LoraAdapter.fresh(llama.model, LoraShape(rank=2))
    larger = LoraAdapter(shape=LoraShape(rank=3), params=small.params)
    with pytest.raises(InputError, match="does not fit"), larger.attach(llama.model):
        pass

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import PreTrainedModel

from cotune.errors import InputError
from cotune.generation.reference import generate
from cotune.generation.request import GenerationRequest
from cotune.models import Backbone
from cotune.models.selected import (
    WEIGHTS_FILE,
    SelectedParameters,
    all_names,
    bias_and_norm_names,
    block_names,
)

INPUT = torch.arange(3, 15)[None]


def logits_of(backbone: Backbone) -> torch.Tensor:
    return backbone.forward_states(INPUT).logits


def disturbed(model: PreTrainedModel, names: list[str]) -> SelectedParameters:
    generator = torch.Generator().manual_seed(1)
    own = SelectedParameters.of(model, names)
    return own.trained({n: t + 0.1 * torch.randn(t.shape, generator=generator) for n, t in own.params.items()})


def test_other_values_are_used_and_the_model_comes_back(backbone: Backbone) -> None:
    before = logits_of(backbone)
    own = {name: (id(p), p.data_ptr(), p.clone()) for name, p in backbone.model.named_parameters()}
    tuned = disturbed(backbone.model, all_names(backbone.model))
    assert tuned.num_parameters == backbone.spec.num_parameters
    with tuned.attach(backbone.model) as model:
        assert model is backbone.model
        assert not torch.allclose(logits_of(backbone), before, atol=1e-2)
        assert {n for n, p in model.named_parameters() if p.requires_grad} == set(tuned.params)
    assert torch.equal(logits_of(backbone), before)
    for name, parameter in backbone.model.named_parameters():
        assert (id(parameter), parameter.data_ptr()) == own[name][:2], name
        assert torch.equal(parameter, own[name][2]) and not parameter.requires_grad


def test_the_model_comes_back_on_error(llama: Backbone) -> None:
    before = logits_of(llama)
    tuned = disturbed(llama.model, bias_and_norm_names(llama.model))
    with pytest.raises(KeyError), tuned.attach(llama.model):
        raise KeyError
    assert torch.equal(logits_of(llama), before)


def test_parameters_that_were_open_to_change_are_so_again(make_model: Callable[..., PreTrainedModel]) -> None:
    model = make_model("llama").requires_grad_(True).train()
    with SelectedParameters.of(model, bias_and_norm_names(model)).attach(model):
        assert sum(parameter.requires_grad for parameter in model.parameters()) == 7 and not model.training
    assert all(parameter.requires_grad for parameter in model.parameters()) and model.training


def test_only_what_is_listed_is_open_to_change_and_nothing_is_copied(llama: Backbone) -> None:
    names = block_names(llama.model, [1])
    own = SelectedParameters.of(llama.model, names)
    places = {name: p.data_ptr() for name, p in llama.model.named_parameters()}
    assert {name: tensor.data_ptr() for name, tensor in own.params.items()} == {name: places[name] for name in names}
    with own.attach(llama.model) as model:
        assert [n for n, p in model.named_parameters() if p.requires_grad] == names
        assert {n: p.data_ptr() for n, p in model.named_parameters()} == places


def test_tied_parameters_change_in_all_places(make_model: Callable[..., PreTrainedModel]) -> None:
    model = make_model("gpt2").requires_grad_(False)
    assert model.lm_head.weight is model.transformer.wte.weight
    tuned = disturbed(model, all_names(model))
    assert "lm_head.weight" not in tuned.params
    with tuned.attach(model):
        assert model.lm_head.weight is model.transformer.wte.weight
        assert torch.equal(model.lm_head.weight, tuned.params["transformer.wte.weight"])


def test_a_backbone_generates_with_the_values_that_are_attached(llama: Backbone) -> None:
    """The fast decoder has copies of the weights; it must not use them meanwhile, nor those of then afterwards."""
    request = GenerationRequest(prompt_ids=np.arange(3, 9), max_new_tokens=8, stop_token_ids=())
    base = generate(llama, None, request).token_ids
    tuned = disturbed(llama.model, all_names(llama.model))
    with tuned.attach(llama.model):
        changed = generate(llama, None, request).token_ids
        ids = torch.tensor([[*range(3, 9), *changed]])
        with torch.no_grad():
            by_transformers = llama.model(input_ids=ids).logits[0, 5:-1].argmax(-1).tolist()
        assert changed == by_transformers != base
    assert generate(llama, None, request).token_ids == base


def test_biases_and_norms_are_found_by_their_modules(make_model: Callable[..., PreTrainedModel]) -> None:
    assert bias_and_norm_names(make_model("llama")) == [
        *(
            f"model.layers.{i}.{norm}.weight"
            for i in range(3)
            for norm in ("input_layernorm", "post_attention_layernorm")
        ),
        "model.norm.weight",
    ]
    of_gpt2 = bias_and_norm_names(make_model("gpt2"))
    assert "transformer.h.0.attn.c_attn.bias" in of_gpt2 and "transformer.ln_f.weight" in of_gpt2
    assert "transformer.h.0.attn.c_attn.weight" not in of_gpt2
    qwen2 = bias_and_norm_names(make_model("qwen2"))
    assert "model.layers.0.self_attn.q_proj.bias" in qwen2


def test_blocks_are_whole_decoder_layers(make_model: Callable[..., PreTrainedModel]) -> None:
    model = make_model("llama")
    names = block_names(model, [2, 0])
    assert names == [n for n, _ in model.named_parameters() if ".layers.0." in n or ".layers.2." in n]
    for wrong in ([], [3], [-1]):
        with pytest.raises(InputError, match="expected some of 0 to 2"):
            block_names(model, wrong)


def test_a_file_holds_what_changed_and_comes_back(tmp_path: Path, backbone: Backbone) -> None:
    before = logits_of(backbone)
    own = SelectedParameters.of(backbone.model, all_names(backbone.model))
    changed = bias_and_norm_names(backbone.model)
    tuned = own.trained({**own.params, **{name: own.params[name] + 0.1 for name in changed}})
    tuned.save(tmp_path / "tuned", backbone.model)
    with safe_open(tmp_path / "tuned" / WEIGHTS_FILE, framework="pt") as file:
        assert sorted(file.offset_keys()) == sorted(changed)
        assert json.loads(file.metadata()["before"]).keys() == own.params.keys()
    again = SelectedParameters.load(tmp_path / "tuned", backbone.model)
    with tuned.attach(backbone.model):
        expected = logits_of(backbone)
    with again.attach(backbone.model):
        assert torch.equal(logits_of(backbone), expected)
    assert torch.equal(logits_of(backbone), before)


@pytest.mark.parametrize("damage", ["no folder", "cut", "other weights", "changed tensor", "other format"])
def test_files_that_are_not_of_this_model_are_refused(
    tmp_path: Path, llama: Backbone, make_model: Callable[..., PreTrainedModel], damage: str
) -> None:
    tuned = disturbed(llama.model, bias_and_norm_names(llama.model))
    tuned.save(tmp_path, llama.model)
    path, folder, model, words = tmp_path / WEIGHTS_FILE, tmp_path, llama.model, "holds no tuned parameters"
    if damage == "no folder":
        folder = tmp_path / "nowhere"
    elif damage == "cut":
        path.write_bytes(path.read_bytes()[:100])
    elif damage == "other weights":
        model, words = make_model("gpt2"), "other weights than these"
    else:
        with safe_open(path, framework="pt") as file:
            metadata, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.offset_keys()}
        if damage == "other format":
            metadata["format"] = "something"
        else:
            tensors["model.norm.weight"] += 1
            words = "is damaged"
        save_file(tensors, path, metadata=metadata)
    with pytest.raises(InputError, match=words):
        SelectedParameters.load(folder, model)


def test_the_whole_model_is_a_folder_like_any_other(tmp_path: Path, backbone: Backbone, tokenizer_json: bytes) -> None:
    tuned = disturbed(backbone.model, all_names(backbone.model))
    tuned.save_model(tmp_path / "model", backbone.model, tokenizer_json)
    with tuned.attach(backbone.model):
        expected = logits_of(backbone)
    whole = Backbone.from_pretrained(str(tmp_path / "model"))
    torch.testing.assert_close(logits_of(whole), expected, atol=1e-6, rtol=1e-6)
    with pytest.raises(InputError, match="holds something already"):
        tuned.save_model(tmp_path / "model", backbone.model, tokenizer_json)


def test_impossible_values_are_refused(llama: Backbone) -> None:
    with pytest.raises(InputError, match=r"lacks nothing\.weight"):
        SelectedParameters.of(llama.model, ["nothing.weight"])
    with pytest.raises(InputError, match="none of the parameters"):
        SelectedParameters.of(llama.model, [])
    wrong = SelectedParameters(params={"model.norm.weight": torch.ones(3)})
    with pytest.raises(InputError, match=r"model\.norm\.weight \(3,\) does not fit"), wrong.attach(llama.model):
        pass

"""Finding one's way in a model of transformers, or saying that it is none of ours."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from transformers import GPT2Config, GPT2Model, MambaConfig, MambaForCausalLM, PreTrainedModel

from cotune.errors import InputError
from cotune.models import Backbone
from cotune.models.anatomy import decoder_layers, num_multiplying, output_embedding

MakeModel = Callable[..., PreTrainedModel]


def test_spec_describes_the_model(backbone: Backbone) -> None:
    spec = backbone.spec
    assert (spec.hidden_size, spec.num_layers, spec.vocab_size, spec.max_context) == (24, 3, 61, 40)
    assert spec.eos_token_ids == (2,) and spec.bos_token_id == 1 and spec.pad_token_id == 0
    assert spec.num_parameters == backbone.model.num_parameters()
    assert len(spec.backbone_digest) == len(spec.tokenizer_digest) == 64


def test_end_tokens_may_be_none_one_or_many(make_model: MakeModel, tokenizer_json: bytes) -> None:
    model = make_model("llama")
    for eos, expected in ((None, ()), (5, (5,)), ([2, 5], (2, 5))):
        model.generation_config.eos_token_id = model.config.eos_token_id = eos
        assert Backbone.from_model(model, tokenizer_json).spec.eos_token_ids == expected


def test_a_model_without_a_padding_token_pads_with_the_first(make_model: MakeModel, tokenizer_json: bytes) -> None:
    for pad in (None, -1):
        assert Backbone.from_model(make_model("llama", pad_token_id=pad), tokenizer_json).spec.pad_token_id == 0


def test_layers_and_head_are_found(backbone: Backbone) -> None:
    layers = decoder_layers(backbone.model)
    assert len(layers) == 3
    assert output_embedding(backbone.model).weight.shape == (61, 24)


def test_an_input_embedding_multiplies_nothing(backbone: Backbone) -> None:
    assert num_multiplying(backbone.model) == backbone.spec.num_parameters - 61 * 24


def test_models_that_cannot_be_cut_back_are_refused(tokenizer_json: bytes) -> None:
    config = MambaConfig(vocab_size=61, hidden_size=8, num_hidden_layers=2, state_size=4, time_step_rank=2)
    with pytest.raises(InputError, match=r"MambaForCausalLM is not supported: .* Llama"):
        Backbone.from_model(MambaForCausalLM(config), tokenizer_json)


def test_models_without_a_head_or_layers_are_refused(make_model: MakeModel) -> None:
    with pytest.raises(InputError, match="GPT2Model is not supported: it needs a linear output embedding"):
        output_embedding(GPT2Model(GPT2Config(n_embd=8, n_layer=1, n_head=1, vocab_size=5)))
    model = make_model("llama")
    model.model.layers = torch.nn.ModuleList(model.model.layers[:2])
    with pytest.raises(InputError, match="no list of 3 decoder layers"):
        decoder_layers(model)

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import peft
import pytest
import torch
from transformers import PreTrainedModel

from cotune.errors import InputError
from cotune.generation.reference import generate
from cotune.generation.request import GenerationRequest
from cotune.models import Backbone
from cotune.models.adapters import LoraShape, has_transposed_weights, linear_targets, lora_config
from cotune.models.peft_adapter import PeftAdapter, read_config

# Where a test calls peft itself: it asks transformers 5 by an old name.
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")

IDS = torch.arange(3, 15)[None]
TASK = peft.TaskType.CAUSAL_LM


def configs(model: PreTrainedModel) -> dict[str, peft.PeftConfig]:
    gpt2 = has_transposed_weights(model)
    return {
        "lora": lora_config(model, LoraShape(rank=2)),
        "dora": lora_config(model, LoraShape(rank=2, use_dora=True)),
        "ia3": peft.IA3Config(task_type=TASK, fan_in_fan_out=gpt2),
        "vera": peft.VeraConfig(task_type=TASK, r=4, target_modules=list(linear_targets(model)), fan_in_fan_out=gpt2),
        "prompt": peft.PromptTuningConfig(task_type=TASK, num_virtual_tokens=3),
        "p_tuning": peft.PromptEncoderConfig(task_type=TASK, num_virtual_tokens=3, encoder_hidden_size=8),
        "prefix": peft.PrefixTuningConfig(task_type=TASK, num_virtual_tokens=3),
        "projected": peft.PrefixTuningConfig(
            task_type=TASK, num_virtual_tokens=3, prefix_projection=True, encoder_hidden_size=8
        ),
    }


KINDS = ("lora", "dora", "ia3", "vera", "prompt", "p_tuning", "prefix", "projected")
IN_FRONT = KINDS[4:]


@pytest.fixture(params=["llama", "gpt2"])
def model(request: pytest.FixtureRequest, make_model: Callable[..., PreTrainedModel]) -> PreTrainedModel:
    return make_model(request.param).eval().requires_grad_(False)


@torch.no_grad()
def logits(model: PreTrainedModel) -> torch.Tensor:
    return model(input_ids=IDS).logits[:, -IDS.shape[1] :]


def disturbed(adapter: PeftAdapter) -> PeftAdapter:
    generator = torch.Generator().manual_seed(2)
    return adapter.trained(
        {name: tensor + 0.1 * torch.randn(tensor.shape, generator=generator) for name, tensor in adapter.params.items()}
    )


def state(model: PreTrainedModel) -> dict[str, tuple[object, ...]]:
    """All that must be as before."""
    return {
        **{name: (id(p), p.data_ptr(), p.requires_grad) for name, p in model.named_parameters()},
        **{f"module {name}": (id(m), m.training, len(m._forward_pre_hooks)) for name, m in model.named_modules()},
    }


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_attached_and_taken_out_again(model: PreTrainedModel, kind: str) -> None:
    before, was = logits(model), state(model)
    adapter = disturbed(PeftAdapter.fresh(model, configs(model)[kind], seed=3))
    with adapter.attach(model) as wrapped:
        assert not torch.allclose(logits(wrapped), before, atol=1e-3)
        assert {n for n, p in wrapped.named_parameters() if p.requires_grad} == set(adapter.params)
        assert not wrapped.training
    with pytest.raises(KeyError), adapter.attach(model):
        raise KeyError
    assert torch.equal(logits(model), before)
    assert state(model) == was


def test_the_model_comes_back_where_peft_fails_in_the_middle(
    model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    was, reset, calls = state(model), peft.tuners.lora.LoraLayer.reset_lora_parameters, []

    def fail_at_the_third(self: object, *args: object) -> None:
        calls.append(1)
        if len(calls) == 3:
            raise ValueError("no more")
        reset(self, *args)

    monkeypatch.setattr(peft.tuners.lora.LoraLayer, "reset_lora_parameters", fail_at_the_third)
    with pytest.raises(InputError, match=r"cannot be put into this .*: no more"):
        PeftAdapter.fresh(model, configs(model)["lora"])
    assert len(calls) == 3 and state(model) == was


@pytest.mark.parametrize("kind", ["lora", "dora", "ia3", "vera"])
def test_a_fresh_adapter_in_the_layers_changes_nothing_and_a_merged_one_is_the_same(
    model: PreTrainedModel, kind: str
) -> None:
    before, was = logits(model), {name: p.clone() for name, p in model.named_parameters()}
    fresh = PeftAdapter.fresh(model, configs(model)[kind])
    assert fresh.num_virtual_tokens == 0
    with fresh.attach(model) as wrapped:
        torch.testing.assert_close(logits(wrapped), before)
    adapter = disturbed(fresh)
    with adapter.attach(model) as wrapped:
        expected = logits(wrapped)
    merged = adapter.merge(model)
    assert all(torch.equal(p, was[name]) for name, p in model.named_parameters())
    with merged.attach(model):
        torch.testing.assert_close(logits(model), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_adapter_comes_back_and_is_what_peft_reads(tmp_path: Path, model: PreTrainedModel, kind: str) -> None:
    adapter = disturbed(PeftAdapter.fresh(model, configs(model)[kind]))
    with adapter.attach(model) as wrapped:
        expected = logits(wrapped)
    adapter.save(tmp_path / "one", model)
    again = PeftAdapter.load(tmp_path / "one", model)
    with again.attach(model) as wrapped:
        assert torch.equal(logits(wrapped), expected)
    again.save(tmp_path / "two", model)
    with PeftAdapter.load(tmp_path / "two", model).attach(model) as wrapped:
        assert torch.equal(logits(wrapped), expected)
    theirs = peft.PeftModel.from_pretrained(model, str(tmp_path / "one")).eval()
    assert torch.equal(logits(theirs), expected)


@pytest.mark.parametrize("kind", ["lora", "prompt"])
def test_what_peft_wrote_is_read(tmp_path: Path, model: PreTrainedModel, kind: str) -> None:
    theirs = peft.get_peft_model(model, configs(model)[kind]).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05)
    expected = logits(theirs)
    theirs.save_pretrained(str(tmp_path), save_embedding_layers=False)
    if kind == "lora":
        theirs.unload()
    with PeftAdapter.load(tmp_path, model).attach(model) as wrapped:
        assert torch.equal(logits(wrapped), expected)


@pytest.mark.parametrize("kind", IN_FRONT)
def test_what_stands_in_front_is_not_passed_by(llama: Backbone, kind: str) -> None:
    request = GenerationRequest(prompt_ids=np.arange(3, 9), max_new_tokens=2, stop_token_ids=())
    generate(llama, None, request)
    adapter = PeftAdapter.fresh(llama.model, configs(llama.model)[kind])
    assert adapter.num_virtual_tokens == 3
    with adapter.attach(llama.model):
        for use in (lambda: llama.forward_states(IDS), lambda: generate(llama, None, request)):
            with pytest.raises(InputError, match="the bare model does not see"):
                use()
    generate(llama, None, request)
    with pytest.raises(InputError, match="cannot be merged"):
        adapter.merge(llama.model)


def test_the_seed_decides_and_the_global_generator_is_left_alone(model: PreTrainedModel) -> None:
    before = torch.get_rng_state()
    made = [PeftAdapter.fresh(model, configs(model)["prefix"], seed=seed).params for seed in (1, 1, 2)]
    assert torch.equal(torch.get_rng_state(), before)
    (name,) = made[0]
    assert torch.equal(made[0][name], made[1][name]) and not torch.equal(made[0][name], made[2][name])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"peft_type": "XLORA"}, "XLORA adapter of peft, expected one of LORA"),
        ({"init_lora_weights": "pissa_niter_4"}, "changes the model's weights"),
        ({"megatron_config": {"a": 1}}, "sets megatron_config"),
        ({"layer_replication": [[0, 2]]}, "sets layer_replication"),
        ({"modules_to_save": ["lm_head"]}, "sets modules_to_save"),
        ({"r": "many"}, "cannot be put into|holds no adapter"),
        ({"r": 5}, "does not fit"),
        ({"target_modules": ["nothing"]}, "cannot be put into"),
    ],
)
def test_configs_that_ask_for_something_else_are_refused(
    tmp_path: Path, llama: Backbone, change: dict[str, object], words: str
) -> None:
    PeftAdapter.fresh(llama.model, configs(llama.model)["lora"]).save(tmp_path, llama.model)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(InputError, match=words):
        PeftAdapter.load(tmp_path, llama.model)


@pytest.mark.parametrize("damage", ["no folder", "no json", "cut weights", "foreign model"])
def test_folders_that_hold_no_adapter_for_this_model_are_refused(
    tmp_path: Path, llama: Backbone, make_model: Callable[..., PreTrainedModel], damage: str
) -> None:
    PeftAdapter.fresh(llama.model, configs(llama.model)["prompt"]).save(tmp_path / "adapter", llama.model)
    folder, model = tmp_path / "adapter", llama.model
    if damage == "no folder":
        folder = tmp_path / "nowhere"
    elif damage == "no json":
        (folder / "adapter_config.json").write_text("[]")
    elif damage == "cut weights":
        weights = folder / "adapter_model.safetensors"
        weights.write_bytes(weights.read_bytes()[:20])
    else:
        model = make_model("llama", hidden_size=32)
    with pytest.raises(InputError):
        PeftAdapter.load(folder, model)


def test_a_prompt_from_a_text_is_read_without_its_tokenizer(tmp_path: Path, llama: Backbone) -> None:
    PeftAdapter.fresh(llama.model, configs(llama.model)["prompt"]).save(tmp_path, llama.model)
    path = tmp_path / "adapter_config.json"
    change = {"prompt_tuning_init": "TEXT", "prompt_tuning_init_text": "hello", "tokenizer_name_or_path": "nowhere/x"}
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    assert read_config(tmp_path).prompt_tuning_init == peft.PromptTuningInit.RANDOM
    PeftAdapter.load(tmp_path, llama.model)


def test_an_adapter_of_another_model_is_refused(llama: Backbone, make_model: Callable[..., PreTrainedModel]) -> None:
    adapter = PeftAdapter.fresh(llama.model, configs(llama.model)["ia3"])
    wider = make_model("llama", intermediate_size=48)
    with pytest.raises(InputError, match="IA3 adapter does not fit"), adapter.attach(wider):
        pass

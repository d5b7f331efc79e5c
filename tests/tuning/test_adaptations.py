"""The contract that every method in `ADAPTATIONS` keeps, on a tiny model and texts that can be learnt."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cotune.data.batches import EncodedExample
from cotune.errors import InputError, NonFiniteLossError
from cotune.models.adapter_folder import load_adapter, load_result
from cotune.models.anatomy import decoder_layers
from cotune.models.backbone import Backbone
from cotune.models.bottleneck import BottleneckAdapter
from cotune.models.peft_adapter import PeftAdapter
from cotune.models.selected import SelectedParameters
from cotune.plugin import Plugin
from cotune.tuning.adaptations import ADAPTATIONS, AdaptationOptions, adaptation_named
from cotune.tuning.answer_loss import TokenBatches, answer_nats
from cotune.tuning.attached import Tunable
from cotune.tuning.gradient_checkpointing import gradient_checkpointing
from cotune.tuning.loop import LoopConfig, LoopProgress
from cotune.tuning.prompted_nats import prompted_nats
from cotune.tuning.tune import TuneConfig, tune

# What a test asks of a method; a learning rate with which so small a model learns in a few steps.
OPTIONS: dict[str, dict[str, Any]] = {
    "lora": {"rank": 4},
    "dora": {"rank": 4},
    "rslora": {"rank": 4},
    "vera": {"rank": 8},
    "adapter": {"width": 4},
    "soft_prompt": {"num_virtual_tokens": 5},
    "p_tuning": {"num_virtual_tokens": 5},
    "prefix": {"num_virtual_tokens": 5},
    "blocks": {"memory_budget_bytes": 200_000},
}
RATES = {"full": 0.01, "blocks": 0.01, "bias": 0.05, "ia3": 0.05, "vera": 0.1, "soft_prompt": 0.1, "prefix": 0.1}
# What does not look into the model needs no second one.
on_one_architecture = pytest.mark.parametrize("backbone", ["llama"], indirect=True)
MERGEABLE = [name for name, method in ADAPTATIONS.items() if method.is_mergeable]


def config_for(name: str, **changes: Any) -> TuneConfig:
    return TuneConfig(
        what=adaptation_named(name, AdaptationOptions(**OPTIONS.get(name, {}))),
        loop=LoopConfig(epochs=2, learning_rate=RATES.get(name, 0.02), checkpoint_interval_s=0.0),
        num_batch_sequences=4,
        **changes,
    )


def nats_of(backbone: Backbone, adapter: Tunable, examples: list[EncodedExample]) -> np.ndarray:
    """Through transformers' or peft's own forward, with the adapter attached."""
    with adapter.attach(backbone.model) as model:
        return prompted_nats(model, examples)


def snapshot(backbone: Backbone) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in backbone.model.state_dict().items()}


def assert_unharmed(backbone: Backbone, before: dict[str, torch.Tensor]) -> None:
    now = backbone.model.state_dict()
    assert now.keys() == before.keys()
    assert all(torch.equal(now[name], before[name]) for name in before)
    assert not any(parameter.requires_grad for parameter in backbone.model.parameters())
    assert not any("forward" in module.__dict__ for module in backbone.model.modules())


@pytest.mark.parametrize("name", list(ADAPTATIONS))
def test_it_learns_saves_loads_and_merges(
    tmp_path: Path, backbone: Backbone, examples: list[EncodedExample], name: str
) -> None:
    before = snapshot(backbone)
    result = tune(backbone, examples, config_for(name), heldout=examples)
    start, end = result.curve[0].heldout_loss, result.curve[result.best_epoch].heldout_loss
    assert start is not None and end is not None and end < start - 0.05
    assert_unharmed(backbone, before)

    # The tuned adapter is as good as the loop said, apart from the loop.
    tuned = nats_of(backbone, result.adapter, examples)
    assert tuned.mean() == pytest.approx(end, abs=1e-4)
    result.adapter.save(tmp_path / "saved", backbone.model)
    loaded = load_adapter(tmp_path / "saved", backbone.model)
    np.testing.assert_array_equal(nats_of(backbone, loaded, examples), tuned)
    # A second life: saved again from what was loaded.
    loaded.save(tmp_path / "again", backbone.model)
    np.testing.assert_array_equal(nats_of(backbone, load_adapter(tmp_path / "again", backbone.model), examples), tuned)
    is_peft = not isinstance(loaded, BottleneckAdapter) and name not in ("full", "bias", "blocks")
    assert isinstance(loaded, PeftAdapter) == is_peft
    if name in MERGEABLE:
        merged = result.adapter.merge(backbone.model)
        np.testing.assert_allclose(nats_of(backbone, merged, examples), tuned, atol=2e-4)
    else:
        with pytest.raises(InputError, match="cannot be merged"):
            result.adapter.merge(backbone.model)
    assert_unharmed(backbone, before)


def logits_of(backbone: Backbone, adapter: Tunable) -> torch.Tensor:
    with adapter.attach(backbone.model) as model, torch.no_grad():
        logits: torch.Tensor = model(input_ids=torch.arange(3, 12)[None]).logits
        return logits


@on_one_architecture
@pytest.mark.parametrize("name", list(ADAPTATIONS))
def test_the_one_door_gives_the_same_logits(
    tmp_path: Path, backbone: Backbone, examples: list[EncodedExample], name: str
) -> None:
    """By what the folder says of itself; a merged model too."""
    config = replace(config_for(name), loop=LoopConfig(epochs=1, learning_rate=0.05), num_batch_sequences=9)
    fresh = config.what.fresh(backbone, examples, seed=0)
    result = tune(backbone, examples, replace(config, what=Ready(fresh)))
    assert result.curve[-1].num_steps == 1
    result.adapter.save(tmp_path / "out", backbone.model)
    loaded = load_result(tmp_path / "out", backbone.model)
    assert not isinstance(loaded, Plugin)
    logits = logits_of(backbone, result.adapter)
    assert torch.equal(logits_of(backbone, loaded), logits)
    assert not torch.allclose(logits_of(backbone, fresh), logits, atol=1e-3), "a step changes something"
    if name in MERGEABLE:
        result.adapter.merge(backbone.model).save_model(tmp_path / "merged", backbone.model, b"{}")
        whole = load_result(tmp_path / "merged", backbone.model)
        assert isinstance(whole, SelectedParameters)
        torch.testing.assert_close(logits_of(backbone, whole), logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", list(ADAPTATIONS))
def test_only_the_listed_parameters_are_touched_and_all_of_them(
    backbone: Backbone, examples: list[EncodedExample], name: str
) -> None:
    """One step with plain back-propagation: the listed ones have a gradient, no other one has."""
    config = config_for(name)
    fresh = config.what.fresh(backbone, examples, seed=0)
    batch = next(TokenBatches(examples, 4, pad_token_id=0, seed=0).epoch(0))
    with fresh.attach(backbone.model) as model:
        labels = torch.from_numpy(batch.labels)
        own = dict(model.named_parameters())
        inputs = {"input_ids": torch.from_numpy(batch.input_ids), "labels": labels}
        model(**inputs, attention_mask=torch.from_numpy(batch.attention_mask)).loss.backward()
        touched = {each for each, parameter in own.items() if parameter.grad is not None}
        assert touched == set(fresh.params)
        assert fresh.num_parameters == sum(own[each].numel() for each in touched)
    result = tune(backbone, examples, replace(config, loop=LoopConfig(epochs=2, learning_rate=0.01)))
    assert result.num_trained == fresh.num_parameters
    assert result.adapter.params.keys() == fresh.params.keys()
    # A zero learning rate would pass everything above.
    assert any(not torch.equal(result.adapter.params[each], fresh.params[each]) for each in fresh.params)


@pytest.mark.parametrize("name", list(ADAPTATIONS))
def test_an_interrupted_and_resumed_run_gives_the_same_weights(
    tmp_path: Path, backbone: Backbone, examples: list[EncodedExample], name: str
) -> None:
    before, config = snapshot(backbone), config_for(name)

    def interrupt(progress: LoopProgress) -> None:
        if progress.step == 3:
            raise KeyboardInterrupt

    # Two steps an epoch: interrupted in the middle of the second.
    examples = examples[:5]
    with pytest.raises(KeyboardInterrupt):
        tune(backbone, examples, config, run_dir=tmp_path, progress=interrupt)
    assert_unharmed(backbone, before)
    resumed = tune(backbone, examples, config, run_dir=tmp_path, resume=True).adapter.params
    whole = tune(backbone, examples, config).adapter.params
    assert resumed.keys() == whole.keys()
    assert all(torch.equal(resumed[each], whole[each]) for each in whole)
    with pytest.raises(InputError, match="another config or other data"):
        tune(backbone, examples, replace(config, weight_decay=0.1), run_dir=tmp_path, resume=True)


@pytest.mark.parametrize("name", list(ADAPTATIONS))
def test_gradient_checkpointing_changes_no_weight(
    backbone: Backbone, examples: list[EncodedExample], name: str
) -> None:
    config = replace(config_for(name), loop=LoopConfig(epochs=1, learning_rate=0.02))
    fresh = config.what.fresh(backbone, examples, seed=0)
    passes: list[int] = []
    last = next(decoder_layers(backbone.model)[-1].children())
    handle = last.register_forward_hook(lambda *_: passes.append(1))
    try:
        what = Ready(fresh)
        kept = tune(backbone, examples, replace(config, what=what)).adapter.params
        num_once = len(passes)
        again = tune(backbone, examples, replace(config, what=what, gradient_checkpointing=True)).adapter.params
    finally:
        handle.remove()
    assert all(torch.equal(kept[each], again[each]) for each in kept)
    # And it did compute again, and less is kept for the backward pass.
    assert len(passes) - num_once == 2 * num_once
    sizes = [saved_bytes(backbone, fresh, examples, enabled=enabled) for enabled in (False, True)]
    assert sizes[1] < 0.6 * sizes[0]


def saved_bytes(backbone: Backbone, fresh: Tunable, examples: list[EncodedExample], *, enabled: bool) -> int:
    """Bytes that a forward pass keeps, by a count of the tensors that are given to it to keep."""
    total = 0

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        nonlocal total
        total += tensor.numel() * tensor.element_size()
        return tensor

    batch = next(TokenBatches(examples, 9, pad_token_id=0, seed=0).epoch(0))
    with fresh.attach(backbone.model) as model, gradient_checkpointing(backbone.model, enabled=enabled):
        leaves = {each: tensor.detach().clone().requires_grad_() for each, tensor in fresh.params.items()}
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            answer_nats(model, model.get_output_embeddings(), leaves, batch)
    return total


@on_one_architecture
@pytest.mark.parametrize("name", list(ADAPTATIONS))
def test_a_loss_that_is_not_finite_ends_it_and_leaves_the_backbone_unharmed(
    backbone: Backbone, examples: list[EncodedExample], name: str
) -> None:
    before = snapshot(backbone)
    config = replace(config_for(name), loop=LoopConfig(epochs=1, learning_rate=0.1))
    norm = [module for module in backbone.model.modules() if "norm" in type(module).__name__.lower()][-1]
    handle = norm.register_forward_hook(lambda module, args, output: output * float("nan"))
    try:
        with pytest.raises(NonFiniteLossError, match="the loss at step 0 is nan"):
            tune(backbone, examples, config)
    finally:
        handle.remove()
    assert_unharmed(backbone, before)


class Ready:
    """What is tuned, made before."""

    def __init__(self, adapter: Tunable) -> None:
        self._adapter = adapter

    def fresh(self, backbone: Backbone, examples: object, *, seed: int) -> Tunable:
        return self._adapter


@on_one_architecture
@pytest.mark.parametrize("name", list(ADAPTATIONS))
def test_nothing_to_learn_from_is_one_clear_error(
    backbone: Backbone, examples: list[EncodedExample], name: str
) -> None:
    before, config = snapshot(backbone), config_for(name)
    with pytest.raises(InputError, match="no examples"):
        tune(backbone, [], config)
    unlabelled = [EncodedExample(np.array([3, 4, 5]), 3), *examples]
    with pytest.raises(InputError, match=r"example 0 has 3 tokens .* all its labels are ignored"):
        tune(backbone, unlabelled, replace(config, what=Ready(config.what.fresh(backbone, examples, seed=0))))
    long = EncodedExample(np.arange(3, 3 + 40) % 30, 3)
    with pytest.raises(InputError, match=r"a text has 40 tokens, expected at most (33|28)"):
        tune(backbone, [long], replace(config, what=Ready(config.what.fresh(backbone, examples, seed=0))))
    assert_unharmed(backbone, before)


def test_options_that_a_method_lacks_are_refused() -> None:
    with pytest.raises(InputError, match="method is 'magic', expected one of full, lora"):
        adaptation_named("magic", AdaptationOptions())
    with pytest.raises(InputError, match=r"rank is 4, which method full does not have; .* take lora or dora or rslora"):
        adaptation_named("full", AdaptationOptions(rank=4))
    with pytest.raises(InputError, match="needs a memory budget"):
        adaptation_named("blocks", AdaptationOptions())
    for name, option in (("lora", "rank"), ("vera", "rank"), ("adapter", "width"), ("prefix", "num_virtual_tokens")):
        with pytest.raises(InputError, match="is 0, expected"):
            what = adaptation_named(name, AdaptationOptions(**{option: 0}))
            raise AssertionError(what)


def test_every_method_says_what_it_is() -> None:
    for name, method in ADAPTATIONS.items():
        assert method.summary and method.learning_rate > 0, name
        expected = OPTIONS.get(name, {}).get("num_virtual_tokens", 0)
        assert method.num_virtual_tokens(AdaptationOptions(**OPTIONS.get(name, {}))) == expected

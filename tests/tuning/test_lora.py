from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cotune.data.batches import EncodedExample
from cotune.errors import InputError
from cotune.generation.reference import generate
from cotune.generation.request import GenerationRequest
from cotune.models.adapters import LoraAdapter, LoraShape
from cotune.models.backbone import Backbone
from cotune.tuning.loop import LoopConfig, LoopProgress
from cotune.tuning.lora import LoraConfig, target_nats, tune_lora

CONFIG = LoraConfig(
    loop=LoopConfig(epochs=6, learning_rate=0.02, checkpoint_interval_s=0.0),
    shape=LoraShape(rank=4),
    num_batch_sequences=4,
)


def base_logits(backbone: Backbone) -> torch.Tensor:
    return backbone.forward_states(torch.arange(3, 13)[None]).logits


def test_it_learns_the_answers_and_leaves_the_backbone_unharmed(
    backbone: Backbone, examples: list[EncodedExample]
) -> None:
    before, base_nats = base_logits(backbone), target_nats(backbone, examples)
    result = tune_lora(backbone, examples, CONFIG)
    assert torch.equal(base_logits(backbone), before)
    assert not any(parameter.requires_grad for parameter in backbone.model.parameters())
    assert not any("lora" in name for name, _ in backbone.model.named_modules())

    with result.adapter.attach(backbone.model):
        assert target_nats(backbone, examples).mean() < base_nats.mean() - 0.5
        assert not torch.equal(base_logits(backbone), before)
    assert torch.equal(base_logits(backbone), before)


def test_losses_are_those_of_the_answers_only_and_exact(backbone: Backbone, examples: list[EncodedExample]) -> None:
    result = tune_lora(backbone, examples, CONFIG, heldout=examples[:5])
    expected = target_nats(backbone, examples[:5])
    assert len(expected) == sum(len(example.input_ids) - 3 for example in examples[:5])
    assert result.curve[0].heldout_loss == pytest.approx(expected.mean(), abs=1e-5)
    with result.adapter.attach(backbone.model):
        tuned = target_nats(backbone, examples[:5])
        # By hand, from all logits of one sequence.
        ids = torch.from_numpy(examples[0].input_ids)
        scores = backbone.forward_states(ids[None]).logits[0].log_softmax(-1)
        by_hand = -scores[torch.arange(2, len(ids) - 1), ids[3:]]
        np.testing.assert_allclose(tuned[: len(by_hand)], by_hand.numpy(), atol=1e-5)
    assert result.curve[result.best_epoch].heldout_loss == pytest.approx(tuned.mean(), abs=1e-5)


def test_the_tuned_model_generates_greedily_what_it_has_learnt(
    backbone: Backbone, examples: list[EncodedExample]
) -> None:
    config = replace(CONFIG, loop=LoopConfig(epochs=60, learning_rate=0.02))
    adapter = tune_lora(backbone, examples[:3], config).adapter
    wanted = examples[1]
    request = GenerationRequest(
        prompt_ids=wanted.input_ids[: wanted.first_target],
        max_new_tokens=len(wanted.input_ids) - wanted.first_target,
        stop_token_ids=(),
    )
    base = generate(backbone, None, request).token_ids
    with adapter.attach(backbone.model):
        assert generate(backbone, None, request).token_ids == wanted.input_ids[wanted.first_target :].tolist()
    assert generate(backbone, None, request).token_ids == base


def test_the_seed_decides_and_the_global_generator_is_left_alone(
    backbone: Backbone, examples: list[EncodedExample]
) -> None:
    before = torch.get_rng_state()
    config = replace(CONFIG, loop=LoopConfig(epochs=1))
    first, second, other = (
        tune_lora(backbone, examples, replace(config, seed=seed)).adapter.params for seed in (1, 1, 2)
    )
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)


def test_an_interrupted_and_resumed_run_gives_the_same_adapter(
    tmp_path: Path, backbone: Backbone, examples: list[EncodedExample]
) -> None:
    before = base_logits(backbone)

    def interrupt(progress: LoopProgress) -> None:
        if progress.step == 8:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tune_lora(backbone, examples, CONFIG, run_dir=tmp_path, progress=interrupt)
    assert torch.equal(base_logits(backbone), before), "an interruption leaves the backbone unharmed too"
    resumed = tune_lora(backbone, examples, CONFIG, run_dir=tmp_path, resume=True).adapter.params
    whole = tune_lora(backbone, examples, CONFIG).adapter.params
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)
    with pytest.raises(InputError, match="another config or other data"):
        tune_lora(backbone, examples[1:], CONFIG, run_dir=tmp_path, resume=True)


def test_a_saved_adapter_comes_back(tmp_path: Path, backbone: Backbone, examples: list[EncodedExample]) -> None:
    adapter = tune_lora(backbone, examples, CONFIG).adapter
    adapter.save(tmp_path / "adapter", backbone.model)
    again = LoraAdapter.load(tmp_path / "adapter", backbone.model)
    with adapter.attach(backbone.model):
        expected = base_logits(backbone)
    with again.attach(backbone.model):
        assert torch.equal(base_logits(backbone), expected)


@pytest.mark.parametrize("changes", [{"num_batch_sequences": 0}, {"weight_decay": -1.0}, {"max_grad_norm": 0.0}])
def test_bad_settings_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=next(iter(changes))):
        LoraConfig(**changes)


def test_no_examples_are_refused(backbone: Backbone) -> None:
    with pytest.raises(InputError, match="no examples"):
        tune_lora(backbone, [], CONFIG)
    with pytest.raises(InputError, match="no examples"):
        target_nats(backbone, [])

"""The forward-only step runs in the memory of inference, full tuning without a second copy of the weights.

Bytes as PyTorch's allocator counts them, so repeatable.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from cotune.data.batches import EncodedExample, TokenBatch
from cotune.evaluation.allocations import count_allocations
from cotune.models.adapters import LoraAdapter, LoraShape
from cotune.models.backbone import Backbone
from cotune.models.selected import SelectedParameters, all_names
from cotune.tuning import perturbed
from cotune.tuning.answer_loss import TokenBatches, answer_nats
from cotune.tuning.attached import AttachedTuner, tune_attached
from cotune.tuning.full import Full
from cotune.tuning.gradient import GradientState
from cotune.tuning.loop import LoopConfig
from cotune.tuning.objectives import AnswerNats
from cotune.tuning.seed_updates import Adam, Momentum, PlainDescent, UpdateRule
from cotune.tuning.sparse_mask import mask_by_magnitude
from cotune.tuning.tune import TuneConfig
from cotune.tuning.tuner import Params
from cotune.tuning.zeroth_order import ZerothOrderConfig, ZerothOrderTuner


def peak_bytes(work: Callable[[], object]) -> int:
    """The most that was allocated at a time beyond what was there before."""
    work()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        work()
    changes = [e.nbytes() for e in profiled.profiler.kineto_results.events() if e.name() == "[memory]"]
    assert changes, "the allocator reports what it does"
    return int(np.cumsum(changes).max())


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    """4.5 M parameters, 18 MB."""
    config = LlamaConfig(
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        vocab_size=2000,
        max_position_embeddings=128,
        bos_token_id=1,
        eos_token_id=2,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return LlamaForCausalLM(config).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def batch() -> TokenBatch:
    rng = np.random.default_rng(0)
    examples = [EncodedExample(rng.integers(3, 2000, 65), 33) for _ in range(4)]
    (made,) = TokenBatches(examples, 4, pad_token_id=0, seed=0).epoch(0)
    return made


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """In proportion to the model: a block is a sixteenth of a MB here and 4 MB for models a hundred times as large."""
    monkeypatch.setitem(perturbed.BLOCK_ELEMENTS, "cpu", 2**14)


def weights_bytes(model: PreTrainedModel) -> int:
    return sum(p.numel() * p.element_size() for p in model.parameters())


def step_bytes(model: PreTrainedModel, batch: TokenBatch, params: Any, mask: Any = None, **config: Any) -> int:
    tuner = ZerothOrderTuner(model, ZerothOrderConfig(**config), AnswerNats(), mask=mask)
    state = tuner.init(params)
    state.learning_rate = 1e-6
    return peak_bytes(lambda: tuner.step(state, batch))


@pytest.fixture(scope="module")
def inference(model: PreTrainedModel, batch: TokenBatch) -> int:
    """Bytes of a pass without gradients."""
    tuner = ZerothOrderTuner(model, ZerothOrderConfig(), AnswerNats())
    state = tuner.init(dict(model.named_parameters()))
    return peak_bytes(lambda: tuner.evaluate(state, batch))


@pytest.mark.parametrize("rule", [PlainDescent(), Momentum(window=3), Adam(window=3)], ids=lambda r: type(r).__name__)
def test_all_parameters_at_most_5_percent_above_inference(
    model: PreTrainedModel, batch: TokenBatch, inference: int, rule: UpdateRule
) -> None:
    weights = weights_bytes(model)
    step = step_bytes(model, batch, dict(model.named_parameters()), rule=rule, num_directions=2, weight_decay=0.1)
    assert 0.02 * weights < inference < weights, "activations are neither nothing nor all"
    assert weights + step < 1.05 * (weights + inference)


def test_a_mask_and_an_adapter_at_most_5_percent_above_inference(
    model: PreTrainedModel, batch: TokenBatch, inference: int
) -> None:
    weights = weights_bytes(model)
    params = {name: p.detach() for name, p in model.named_parameters()}
    step = step_bytes(model, batch, params, mask_by_magnitude(params, 0.01))
    assert weights + step < 1.05 * (weights + inference)
    adapter = LoraAdapter.fresh(model, LoraShape(rank=2))
    with adapter.attach(model) as attached:
        step = step_bytes(attached, batch, adapter.params)
    assert weights + step < 1.05 * (weights + inference)


def test_back_propagation_is_far_above(model: PreTrainedModel, batch: TokenBatch) -> None:
    """The measure sees what the usual way costs: a gradient and two moments for each parameter, and activations."""
    state = GradientState.start({name: p.detach() for name, p in model.named_parameters()}, weight_decay=0.0)
    head = model.get_output_embeddings()

    def descend() -> None:
        state.optimizer.state.clear()
        state.descend(answer_nats(model, head, state.params, batch).mean(), max_grad_norm=1.0)

    assert peak_bytes(descend) > 2.5 * weights_bytes(model)


class OnACopy(AttachedTuner):
    """The way it was: the trained weights stand beside the model's own."""

    def init(self, params: Params) -> GradientState:
        return GradientState.start(params, weight_decay=self._config.weight_decay)


def full_tuning_bytes(model: PreTrainedModel, batch: TokenBatch, tuner_class: type[AttachedTuner]) -> int:
    """From an untuned model to the end of its second step; the learning rate is 0."""
    whole = SelectedParameters.of(model, all_names(model))

    def tune() -> None:
        with whole.attach(model) as attached:
            tuner = tuner_class(attached, TuneConfig(what=Full()))
            state = tuner.init(whole.params)
            for _ in range(2):
                tuner.step(state, batch)

    tune()
    return count_allocations(tune).peak_bytes


@pytest.fixture(scope="module")
def full_tuning(model: PreTrainedModel, batch: TokenBatch) -> int:
    return full_tuning_bytes(model, batch, AttachedTuner)


def test_full_tuning_has_the_weights_once(model: PreTrainedModel, batch: TokenBatch, full_tuning: int) -> None:
    weights = weights_bytes(model)
    assert full_tuning_bytes(model, batch, OnACopy) - full_tuning == pytest.approx(weights, rel=0.02)
    assert full_tuning > 3 * weights, "a gradient and two moments"


def test_what_a_whole_run_keeps_aside_waits_on_disk(model: PreTrainedModel, tmp_path: Path, full_tuning: int) -> None:
    """The values before, the best epoch's and checkpoints take no memory in the fullest step.

    Read back, a file is mapped, which counts here as allocated, with the moments and the result beside it: four times
    the weights. A copy that is kept in memory would make it more than that.
    """
    rng = np.random.default_rng(0)
    examples = [EncodedExample(rng.integers(3, 2000, 65), 33) for _ in range(4)]
    backbone, config = Backbone.from_model(model, b"{}"), TuneConfig(what=Full(), loop=LoopConfig(epochs=2))
    whole = SelectedParameters.of(model, all_names(model))

    def run() -> None:
        tune_attached(
            backbone,
            whole,
            AttachedTuner,
            examples,
            config,
            heldout=examples,
            run_dir=tmp_path,
            resume=False,
            progress=None,
        )

    run()
    weights = weights_bytes(model)
    assert 4 * weights < full_tuning + 0.75 * weights
    assert count_allocations(run).peak_bytes < full_tuning + 0.75 * weights

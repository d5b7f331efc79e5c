from __future__ import annotations

import peft
import pytest
import torch

from cotune.data.batches import EncodedExample
from cotune.errors import InputError
from cotune.models.adapters import LoraAdapter, LoraShape, lora_config
from cotune.models.backbone import Backbone
from cotune.tuning.answer_loss import TokenBatches
from cotune.tuning.attached import AttachedTuner
from cotune.tuning.estimators import BackPropagation, Updated
from cotune.tuning.loop import LoopConfig
from cotune.tuning.lora import Lora, LoraConfig, tune_lora
from cotune.tuning.tune import TuneConfig, tune


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("variant", ["plain", "dora", "rslora"])
def test_lora_learns_step_for_step_as_in_pefts_own_loop(
    backbone: Backbone, examples: list[EncodedExample], variant: str, checkpointing: bool
) -> None:
    """Ours, against peft in its own words: transformers' loss over shifted labels, backward, torch's AdamW."""
    shape = LoraShape(rank=4, use_dora=variant == "dora", use_rslora=variant == "rslora")
    start = LoraAdapter.fresh(backbone.model, shape, seed=5)
    # A B that is not zero, so that all gradients are alive from the first step on.
    generator = torch.Generator().manual_seed(0)
    start = start.trained({n: t + 0.05 * torch.randn(t.shape, generator=generator) for n, t in start.params.items()})
    batches = list(TokenBatches(examples, 3, pad_token_id=0, seed=0).epoch(0)) * 2
    rates = [0.01, 0.02, 0.005, 0.01, 0.02, 0.01]

    theirs = peft.get_peft_model(backbone.model, lora_config(backbone.model, shape))
    try:
        leaves = {n: p for n, p in theirs.named_parameters() if p.requires_grad}
        with torch.no_grad():
            for name, leaf in leaves.items():
                leaf.copy_(start.params[name])
        optimizer = torch.optim.AdamW(leaves.values(), weight_decay=0.01)
        theirs.eval()
        course = []
        for batch, rate in zip(batches, rates, strict=True):
            optimizer.zero_grad()
            loss = theirs(
                input_ids=torch.from_numpy(batch.input_ids),
                attention_mask=torch.from_numpy(batch.attention_mask),
                labels=torch.from_numpy(batch.labels),
            ).loss
            loss.backward()
            gradients = {n: p.grad.clone() for n, p in leaves.items()}
            torch.nn.utils.clip_grad_norm_(leaves.values(), 1.0)
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.step()
            course.append((float(loss.detach()), gradients, {n: p.detach().clone() for n, p in leaves.items()}))
    finally:
        theirs.unload()

    config = LoraConfig(weight_decay=0.01, max_grad_norm=1.0)
    with start.attach(backbone.model) as model:
        from cotune.tuning.gradient_checkpointing import gradient_checkpointing

        tuner = AttachedTuner(model, config)
        state = tuner.init(start.params)
        # Gradients are let go of after the step.
        used: dict[str, torch.Tensor] = {}
        state.optimizer.register_step_pre_hook(
            lambda *_: used.update({n: p.grad.clone() for n, p in state.params.items() if p.grad is not None})
        )
        for batch, rate, (loss, gradients, weights) in zip(batches, rates, course, strict=True):
            state.learning_rate = rate
            with gradient_checkpointing(backbone.model, enabled=checkpointing):
                state, metrics = tuner.step(state, batch)
            assert metrics["loss"] == pytest.approx(loss, abs=1e-5)
            norm = torch.stack([g.square().sum() for g in gradients.values()]).sum().sqrt()
            assert metrics["grad_norm"] == pytest.approx(float(norm), rel=1e-4)
            clip = min(1.0, 1.0 / (float(norm) + 1e-6))
            for name, leaf in state.params.items():
                torch.testing.assert_close(used[name], clip * gradients[name], atol=2e-6, rtol=2e-4)
                torch.testing.assert_close(leaf.detach(), weights[name], atol=2e-5, rtol=2e-4)


def test_the_general_way_is_that_of_lora(backbone: Backbone, examples: list[EncodedExample]) -> None:
    loop = LoopConfig(epochs=2, learning_rate=0.02)
    shape = LoraShape(rank=2)
    one = tune_lora(backbone, examples, LoraConfig(loop=loop, shape=shape, seed=3), heldout=examples[:3])
    other = tune(backbone, examples, TuneConfig(what=Lora(shape=shape), loop=loop, seed=3), heldout=examples[:3])
    assert [r.heldout_loss for r in one.curve] == [r.heldout_loss for r in other.curve]
    assert isinstance(other.adapter, LoraAdapter) and other.adapter.shape == shape
    assert all(torch.equal(one.adapter.params[name], other.adapter.params[name]) for name in one.adapter.params)


def test_another_estimator_is_used_where_one_is_given(backbone: Backbone, examples: list[EncodedExample]) -> None:
    """What is tuned and how are apart: an estimator that learns nothing leaves what it was given."""
    seen = []

    class Lazy(BackPropagation):
        def __call__(self, backbone, fresh, examples, config, **others):  # type: ignore[no-untyped-def]
            seen.append((len(examples), config.num_batch_sequences, sorted(others)))
            return Updated(params=fresh.params, curve=[], best_epoch=0)

    config = TuneConfig(what=Lora(shape=LoraShape(rank=2)), loop=LoopConfig(epochs=2), num_batch_sequences=3)
    result = tune(backbone, examples, config, estimator=Lazy())
    assert seen == [(len(examples), 3, ["heldout", "progress", "resume", "run_dir"])]
    fresh = LoraAdapter.fresh(backbone.model, LoraShape(rank=2), seed=0).params
    assert all(torch.equal(result.adapter.params[name], fresh[name]) for name in fresh)


@pytest.mark.parametrize("changes", [{"num_batch_sequences": 0}, {"weight_decay": -1.0}, {"max_grad_norm": 0.0}])
def test_bad_settings_are_refused(changes: dict[str, float]) -> None:
    with pytest.raises(InputError, match=next(iter(changes))):
        TuneConfig(what=Lora(), **changes)  # type: ignore[arg-type]

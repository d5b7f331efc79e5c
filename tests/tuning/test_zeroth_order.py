from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from philox_reference import reference_signs
from torch import nn
from transformers import PreTrainedModel

from cotune.data.batches import EncodedExample, TokenBatch
from cotune.errors import InputError, NonFiniteLossError
from cotune.models.adapters import LoraAdapter, LoraShape
from cotune.models.backbone import Backbone
from cotune.models.bottleneck import BottleneckAdapter
from cotune.tuning.answer_loss import TokenBatches, answer_nats
from cotune.tuning.choice_objectives import ChoiceBatch, ChoiceErrors, ChoiceExample, ChoiceNats
from cotune.tuning.directions import direction_seed
from cotune.tuning.in_place import tune_in_place
from cotune.tuning.loop import LoopConfig, LoopProgress
from cotune.tuning.lora import target_nats
from cotune.tuning.objectives import AnswerNats, ExampleBatches, ExampleLosses
from cotune.tuning.seed_updates import Adam, Momentum, UpdateRule
from cotune.tuning.sparse_mask import SparseMask, mask_by_gradient
from cotune.tuning.zeroth_order import ZerothOrderConfig, ZerothOrderTuner, tune_zeroth_order

EPS = 2.0**-10
# What does not look into the model needs no second one.
on_one_architecture = pytest.mark.parametrize("backbone", ["llama"], indirect=True)


@dataclass(frozen=True, kw_only=True)
class OwnParameters:
    """All parameters of a model itself, as something to tune."""

    params: dict[str, torch.Tensor]

    @classmethod
    def fresh(cls, model: nn.Module) -> OwnParameters:
        return cls(params={name: p.detach().clone() for name, p in model.named_parameters()})

    @contextmanager
    def attach(self, model: PreTrainedModel) -> Iterator[PreTrainedModel]:
        own = dict(model.named_parameters())
        before = {name: p.detach().clone() for name, p in own.items()}
        with torch.no_grad():
            for name, tensor in self.params.items():
                own[name].copy_(tensor)
        try:
            yield model
        finally:
            with torch.no_grad():
                for name, tensor in before.items():
                    own[name].copy_(tensor)


class Regression:
    """1/2 (w . x + b - y)^2 for each row of a batch (x, y)."""

    def __call__(self, model: Any, params: Mapping[str, torch.Tensor], batch: Any) -> ExampleLosses:
        x, y = batch
        errors = nn.functional.linear(x, params["weight"], params["bias"])[:, 0] - y
        return ExampleLosses(sums=0.5 * errors.double() ** 2, counts=torch.ones(len(y), dtype=torch.float64))


def regression(dtype: torch.dtype = torch.float64) -> tuple[nn.Linear, tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    model = nn.Linear(5, 1).to(dtype)
    with torch.no_grad():
        model.weight.normal_(generator=generator)
        model.bias.normal_(generator=generator)
    x, y = torch.randn(6, 5, generator=generator), torch.randn(6, generator=generator)
    return model, (x.to(dtype), y.to(dtype))


def make_tuner(model: Any, objective: Any = None, mask: Any = None, **config: Any) -> Any:
    return ZerothOrderTuner(model, ZerothOrderConfig(**config), objective or Regression(), mask=mask)


def bits(params: Mapping[str, torch.Tensor]) -> dict[str, list[int]]:
    return {name: tensor.detach().reshape(-1).view(torch.uint8).tolist() for name, tensor in params.items()}


def test_ten_steps_agree_with_numpy() -> None:
    """Algorithm 1 with two directions and weight decay, in NumPy; it shares the seeds and nothing else."""
    model, (x, y) = regression()
    tuner = make_tuner(model, zo_eps=EPS, num_directions=2, weight_decay=0.1, seed=3)
    state = tuner.init(dict(model.named_parameters()))
    w, b = model.weight.detach().numpy()[0].copy(), float(model.bias.detach())
    lr = 0.02

    def loss(w: np.ndarray, b: float) -> float:
        return float(np.mean(0.5 * (x.numpy() @ w + b - y.numpy()) ** 2))

    for step in range(10):
        state.learning_rate = lr
        state, metrics = tuner.step(state, (x, y))
        gradient_w, gradient_b, losses = 0.0, 0.0, []
        for index in range(2):
            seed = direction_seed(3, step, index)
            z_b, z_w = reference_signs(seed, 0, 1)[0], reference_signs(seed, 128, 5)
            plus, minus = loss(w + EPS * z_w, b + EPS * z_b), loss(w - EPS * z_w, b - EPS * z_b)
            slope = (plus - minus) / (2 * EPS)
            losses += [plus, minus]
            gradient_w, gradient_b = gradient_w + slope * z_w / 2, gradient_b + slope * z_b / 2
        w, b = w - lr * (gradient_w + 0.1 * w), b - lr * gradient_b
        assert metrics["loss"] == pytest.approx(np.mean(losses), rel=1e-12)
        np.testing.assert_allclose(model.weight.detach().numpy()[0], w, rtol=1e-9)
        assert float(model.bias.detach()) == pytest.approx(b, rel=1e-9)


def test_a_step_of_a_language_model_agrees_with_moved_copies(
    backbone: Backbone, examples: list[EncodedExample]
) -> None:
    """theta +- eps z written out with the NumPy directions, and the loss of back-propagation on them."""
    model = backbone.model
    head = model.get_output_embeddings()
    (batch,) = TokenBatches(examples[:4], 4, pad_token_id=0, seed=0).epoch(0)
    with OwnParameters.fresh(model).attach(model):
        theta = {name: p.detach().clone() for name, p in model.named_parameters()}
        seed, place, z = direction_seed(1, 0, 0), 0, {}
        for name in sorted(theta):
            signs = reference_signs(seed, place, theta[name].numel())
            z[name] = torch.from_numpy(signs.astype(np.float32)).view(theta[name].shape)
            place += -(-theta[name].numel() // 128) * 128
        with torch.no_grad():
            plus, minus = (
                answer_nats(model, head, {n: t + eps * z[n] for n, t in theta.items()}, batch).double().mean()
                for eps in (EPS, -EPS)
            )
        slope = float(plus - minus) / (2 * EPS)
        tuner = make_tuner(model, AnswerNats(), zo_eps=EPS, seed=1)
        state = tuner.init(theta)
        state.learning_rate = 1e-3
        state, metrics = tuner.step(state, batch)
        assert metrics["projected_grad"] == pytest.approx(abs(slope), rel=1e-3)
        for name, tensor in model.named_parameters():
            torch.testing.assert_close(tensor.detach(), theta[name] - 1e-3 * slope * z[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("masked", [False, True])
def test_a_step_with_learning_rate_zero_changes_no_bit(
    backbone: Backbone, examples: list[EncodedExample], dtype: torch.dtype, masked: bool
) -> None:
    model = backbone.model
    (batch,) = TokenBatches(examples[:4], 4, pad_token_id=0, seed=0).epoch(0)
    with OwnParameters.fresh(model).attach(model):
        try:
            model.to(dtype)
            before = bits(dict(model.named_parameters()))
            name = "model.norm.weight" if "model.norm.weight" in before else "transformer.ln_f.weight"
            mask = SparseMask(indices={name: torch.tensor([0, 3], dtype=torch.int32)}) if masked else None
            tuner = make_tuner(model, AnswerNats(), mask, zo_eps=1e-2, num_directions=3, weight_decay=0.5)
            state = tuner.init(dict(model.named_parameters()))
            state, metrics = tuner.step(state, batch)
            assert metrics["projected_grad"] > 0, "the parameters were moved"
            assert bits(dict(model.named_parameters())) == before
        finally:
            model.to(torch.float32)


ATTACHABLES = {
    "lora": lambda model: LoraAdapter.fresh(model, LoraShape(rank=4), seed=0),
    "bottleneck": lambda model: BottleneckAdapter.fresh(model, 6, seed=0),
    "own parameters": OwnParameters.fresh,
}
# What each needs to learn on a model of 16 channels.
RATES = {"lora": 1e-2, "bottleneck": 0.05, "own parameters": 3e-3}


@pytest.mark.parametrize("name", ATTACHABLES)
def test_it_learns_and_leaves_the_backbone_unharmed(
    backbone: Backbone, examples: list[EncodedExample], name: str
) -> None:
    before, global_state = bits(dict(backbone.model.named_parameters())), torch.get_rng_state()
    base = target_nats(backbone, examples).mean()
    fresh = ATTACHABLES[name](backbone.model)
    given = bits(fresh.params)
    config = ZerothOrderConfig(loop=LoopConfig(epochs=25, learning_rate=RATES[name], warmup_fraction=0.0), zo_eps=1e-2)
    result = tune_zeroth_order(backbone, fresh, examples, config)
    assert bits(dict(backbone.model.named_parameters())) == before and bits(fresh.params) == given
    assert torch.equal(torch.get_rng_state(), global_state)
    assert result.params.keys() == fresh.params.keys() and result.best_epoch == 25
    with replace(fresh, params=result.params).attach(backbone.model):
        assert target_nats(backbone, examples).mean() < base - 0.1


@on_one_architecture
@pytest.mark.parametrize("rule", [Momentum(window=6), Adam(window=6)], ids=["momentum", "adam"])
def test_other_rules_learn_too(backbone: Backbone, examples: list[EncodedExample], rule: UpdateRule) -> None:
    loop = LoopConfig(epochs=8, learning_rate=1e-2)
    config = ZerothOrderConfig(loop=loop, num_directions=2, zo_eps=1e-2, rule=rule)
    fresh = LoraAdapter.fresh(backbone.model, LoraShape(rank=4), seed=0)
    result = tune_zeroth_order(backbone, fresh, examples, config, heldout=examples)
    losses = [record.heldout_loss for record in result.curve]
    assert losses[0] is not None and min(loss for loss in losses if loss is not None) < losses[0] - 0.1


@on_one_architecture
def test_a_mask_learns_with_one_number_in_a_hundred(backbone: Backbone, examples: list[EncodedExample]) -> None:
    model, base = backbone.model, target_nats(backbone, examples).mean()
    head = model.get_output_embeddings()
    batches = TokenBatches(examples, 1, pad_token_id=0, seed=0).epoch(0)
    params = {name: p.detach() for name, p in model.named_parameters()}
    mask = mask_by_gradient(params, 0.01, lambda p, batch: answer_nats(model, head, p, batch).mean(), batches)
    config = ZerothOrderConfig(loop=LoopConfig(epochs=15, learning_rate=0.03), num_directions=2, zo_eps=1e-2, seed=1)
    fresh = OwnParameters.fresh(model)
    tuned = tune_zeroth_order(backbone, fresh, examples, config, mask=mask).params
    for name, tensor in tuned.items():
        changed = (tensor != fresh.params[name]).view(-1).nonzero()[:, 0].tolist()
        assert set(changed) <= set(mask.indices.get(name, torch.empty(0)).tolist()), name
    with OwnParameters(params=tuned).attach(model):
        assert target_nats(backbone, examples).mean() < base - 0.1


@on_one_architecture
@pytest.mark.parametrize("objective", [ChoiceNats(), ChoiceErrors()], ids=["cross-entropy", "accuracy"])
def test_label_words_are_learnt_also_without_a_gradient(backbone: Backbone, objective: Any) -> None:
    rng = np.random.default_rng(0)
    words = tuple(np.array([word], np.int64) for word in (30, 31))
    questions = [
        ChoiceExample(prompt_ids=np.array([1, 5 + label, 9], np.int64), choices=words, label=label)
        for label in rng.integers(0, 2, 16).tolist()
    ]
    batches = ExampleBatches(questions, 16, lambda some: ChoiceBatch.of(some, 0), seed=0)
    (batch,) = batches.epoch(0)
    config = ZerothOrderConfig(zo_eps=0.05, num_directions=4)
    fresh = OwnParameters.fresh(backbone.model)

    def errors(params: dict[str, torch.Tensor]) -> float:
        with replace(fresh, params=params).attach(backbone.model) as model, torch.no_grad():
            return ChoiceErrors()(model, dict(model.named_parameters()), batch).mean

    params, _ = tune_in_place(
        backbone.model,
        fresh,
        lambda model: ZerothOrderTuner(model, config, objective),
        batches,
        LoopConfig(epochs=10, learning_rate=0.05, warmup_fraction=0.0),
        fingerprint="",
    )
    assert errors(fresh.params) >= 0.25 and errors(params) == 0


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("when", ["first loss", "second loss", "second direction"])
@pytest.mark.parametrize("masked", [False, True])
def test_a_non_finite_loss_changes_nothing(bad: float, when: str, masked: bool) -> None:
    calls = []

    class Breaks(Regression):
        def __call__(self, model: Any, params: Any, batch: Any) -> ExampleLosses:
            calls.append(1)
            losses = super().__call__(model, params, batch)
            if len(calls) == {"first loss": 5, "second loss": 6, "second direction": 8}[when]:
                return ExampleLosses(sums=losses.sums * bad, counts=losses.counts)
            return losses

    model, batch = regression(torch.float32)
    mask = SparseMask(indices={"weight": torch.tensor([1, 4])}) if masked else None
    tuner = make_tuner(model, Breaks(), mask, num_directions=2, rule=Momentum())
    state = tuner.init(dict(model.named_parameters()))
    state.learning_rate = 0.1
    state, _ = tuner.step(state, batch)
    before, slopes = bits(state.params), list(state.slopes)
    with pytest.raises(NonFiniteLossError, match="the loss at step 1 is") as caught:
        tuner.step(state, batch)
    assert caught.value.step == 1 and not math.isfinite(caught.value.loss)
    assert bits(state.params) == before and state.slopes == slopes and state.num_steps == 1


@on_one_architecture
@pytest.mark.parametrize("name", ATTACHABLES)
def test_an_interrupted_and_resumed_run_gives_the_same_weights(
    tmp_path: Path, backbone: Backbone, examples: list[EncodedExample], name: str
) -> None:
    config = ZerothOrderConfig(
        loop=LoopConfig(epochs=3, learning_rate=1e-3, checkpoint_interval_s=0.0),
        rule=Momentum(window=3),
        num_directions=2,
        num_batch_sequences=4,
    )
    before = bits(dict(backbone.model.named_parameters()))

    def interrupt(progress: LoopProgress) -> None:
        if progress.step == 5:
            raise KeyboardInterrupt

    fresh = ATTACHABLES[name](backbone.model)
    with pytest.raises(KeyboardInterrupt):
        tune_zeroth_order(backbone, fresh, examples, config, heldout=examples, run_dir=tmp_path, progress=interrupt)
    assert bits(dict(backbone.model.named_parameters())) == before
    resumed, whole = (
        tune_zeroth_order(backbone, fresh, examples, config, heldout=examples, **options).params
        for options in ({"run_dir": tmp_path, "resume": True}, {})
    )
    assert bits(resumed) == bits(whole) != bits(fresh.params)
    mask = SparseMask(indices={next(iter(fresh.params)): torch.tensor([0])})
    with pytest.raises(InputError, match="another config or other data"):
        tune_zeroth_order(backbone, fresh, examples, config, heldout=examples, run_dir=tmp_path, resume=True, mask=mask)


def test_a_state_keeps_the_slopes_that_its_rule_needs() -> None:
    model, batch = regression()
    for rule, kept in ((Momentum(window=3), [2, 3, 4]), (Adam(window=2), [3, 4])):
        tuner = make_tuner(model, rule=rule, num_directions=2)
        state = tuner.init(dict(model.named_parameters()))
        for _ in range(5):
            state, _ = tuner.step(state, batch)
        assert sorted({slope.step for slope in state.slopes}) == kept and len(state.slopes) == 2 * len(kept)
    tuner = make_tuner(model)
    state, _ = tuner.step(tuner.init(dict(model.named_parameters())), batch)
    assert state.slopes == []


def test_the_model_must_have_what_is_tuned(backbone: Backbone) -> None:
    tuner = make_tuner(backbone.model, AnswerNats())
    with pytest.raises(InputError, match=r"no parameter lora\.weight; attach the adapter"):
        tuner.init({"lora.weight": torch.zeros(2)})
    name, tensor = next(iter(backbone.model.named_parameters()))
    with pytest.raises(InputError, match=f"{name} in the checkpoint has shape"):
        tuner.init({name: tensor[:1]})
    state = tuner.init({name: tensor})
    with pytest.raises(InputError, match="other parameters"):
        state.load_tensors({"num_steps": torch.tensor(0)})


@pytest.mark.parametrize(
    "changes",
    [
        {"zo_eps": 0.0},
        {"zo_eps": math.nan},
        {"zo_eps": 1e4},
        {"num_directions": 0},
        {"weight_decay": -1.0},
        {"num_batch_sequences": 0},
        {"seed": -1},
    ],
)
def test_bad_settings_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=f"{next(iter(changes))} is"):
        ZerothOrderConfig(**changes)


def test_no_examples_are_refused(backbone: Backbone) -> None:
    with pytest.raises(InputError, match="no examples"):
        tune_zeroth_order(backbone, OwnParameters.fresh(backbone.model), [], ZerothOrderConfig())


def test_labels_that_are_all_ignored_are_one_clear_error(backbone: Backbone, examples: list[EncodedExample]) -> None:
    (batch,) = TokenBatches(examples[:2], 2, pad_token_id=0, seed=0).epoch(0)
    ignored = TokenBatch(batch.input_ids, batch.attention_mask, np.full_like(batch.labels, -100))
    tuner = make_tuner(backbone.model, AnswerNats())
    state = tuner.init(dict(backbone.model.named_parameters()))
    with pytest.raises(InputError, match="all labels of the batch are ignored"):
        tuner.step(state, ignored)

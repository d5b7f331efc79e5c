from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from philox_reference import reference_signs

from cotune.data.batches import EncodedExample
from cotune.errors import InputError, NonFiniteLossError
from cotune.models.adapters import LoraAdapter, LoraShape
from cotune.models.backbone import Backbone
from cotune.models.bottleneck import BottleneckAdapter
from cotune.tuning.answer_loss import TokenBatches, answer_nats
from cotune.tuning.directions import direction_seed
from cotune.tuning.forward_gradient import (
    ForwardGradientConfig,
    ForwardGradientTuner,
    differentiate_forward,
    tune_forward_gradient,
    variance_of_halves,
)
from cotune.tuning.in_place import Slope
from cotune.tuning.loop import LoopConfig, LoopProgress
from cotune.tuning.lora import target_nats
from cotune.tuning.objectives import AnswerNats, ExampleLosses
from cotune.tuning.sparse_mask import SparseMask
from cotune.tuning.tuned_numbers import TunedNumbers

# What does not look into the model needs no second one.
on_one_architecture = pytest.mark.parametrize("backbone", ["llama"], indirect=True)
ATTACHABLES: dict[str, Any] = {
    "lora": lambda model: LoraAdapter.fresh(model, LoraShape(rank=4), seed=0),
    "bottleneck": lambda model: BottleneckAdapter.fresh(model, 6, seed=0),
}


class Linear:
    """3 w_0 - 2 w_4, one example: its gradient is known, and the same everywhere."""

    def __call__(self, model: Any, params: Any, batch: Any) -> ExampleLosses:
        sums = (3 * params["w"][0] - 2 * params["w"][4])[None].double()
        return ExampleLosses(sums=sums, counts=torch.ones(1, dtype=torch.float64))


class Holder(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = torch.nn.Parameter(torch.arange(5.0))


def linear_tuner(**config: Any) -> tuple[Any, Any]:
    tuner = ForwardGradientTuner(Holder(), ForwardGradientConfig(**config), Linear())  # type: ignore[arg-type]
    return tuner, tuner.init({"w": torch.arange(5.0)})


def test_the_variance_of_halves_by_hand() -> None:
    """Five slopes: halves of two and three, each the mean of its forward gradients."""
    numbers = TunedNumbers({"w": torch.zeros(3, 30), "b": torch.zeros(4)})
    values = [1.0, -2.0, 0.5, 3.0, -1.0]
    slopes = [Slope(0, seed, value) for seed, value in enumerate(values)]
    whole = [
        np.concatenate([reference_signs(seed, 0, 4), reference_signs(seed, 128, 90)]) * value
        for seed, value in enumerate(values)
    ]
    first, second = np.mean(whole[:2], axis=0), np.mean(whole[2:], axis=0)
    expected = np.mean(np.var([first, second], axis=0, ddof=1))
    assert variance_of_halves(numbers, slopes) == pytest.approx(expected, rel=1e-6)


def test_a_step_is_the_mean_of_forward_gradients() -> None:
    tuner, state = linear_tuner(num_perturbations=3, max_variance=math.inf, seed=4, zo_eps=0.5)
    state.learning_rate = 0.1
    state, metrics = tuner.step(state, None)
    signs = [reference_signs(direction_seed(4, 0, index), 0, 5) for index in range(3)]
    gradient = np.mean([(3 * z[0] - 2 * z[4]) * z for z in signs], axis=0)
    np.testing.assert_allclose(state.params["w"].numpy(), np.arange(5) - 0.1 * gradient, rtol=1e-5)
    assert metrics["stepped"] == 1 and metrics["loss"] == pytest.approx(-8.0) and state.slopes == []


def test_the_gate_waits_until_enough_directions_agree() -> None:
    """Nothing moves while it is shut; what waited is not lost."""
    tuner, state = linear_tuner(num_perturbations=2, max_variance=1.5, max_perturbations=1000)
    state.learning_rate = 0.1
    waited = 0
    while True:
        state, metrics = tuner.step(state, None)
        waited += 1
        assert metrics["num_perturbations"] == 2 * waited
        if metrics["stepped"]:
            break
        assert metrics["variance"] > 1.5 and len(state.slopes) == 2 * waited
        assert state.params["w"].tolist() == [0, 1, 2, 3, 4]
    assert waited > 2 and metrics["variance"] <= 1.5
    seeds = [direction_seed(0, step, index) for step in range(waited) for index in range(2)]
    signs = [reference_signs(seed, 0, 5) for seed in seeds]
    gradient = np.mean([(3 * z[0] - 2 * z[4]) * z for z in signs], axis=0)
    np.testing.assert_allclose(state.params["w"].numpy(), np.arange(5) - 0.1 * gradient, rtol=1e-4, atol=1e-6)


def test_it_does_not_wait_without_end() -> None:
    tuner, state = linear_tuner(num_perturbations=2, max_variance=1e-12, max_perturbations=6)
    stepped = []
    for _ in range(6):
        state, metrics = tuner.step(state, None)
        stepped.append(metrics["stepped"])
    assert stepped == [0, 0, 1, 0, 0, 1]


@pytest.mark.parametrize("masked", [False, True])
def test_forward_mode_is_exact(backbone: Backbone, examples: list[EncodedExample], masked: bool) -> None:
    """Against the gradient by back-propagation, times the direction."""
    model, fresh = backbone.model, ATTACHABLES["bottleneck"](backbone.model)
    (batch,) = TokenBatches(examples[:4], 4, pad_token_id=0, seed=0).epoch(0)
    name = next(iter(fresh.params))
    mask = SparseMask(indices={name: torch.tensor([2, 5], dtype=torch.int32)}) if masked else None
    with fresh.attach(model) as attached:
        tuner = ForwardGradientTuner(attached, ForwardGradientConfig(), AnswerNats(), mask=mask)
        state = tuner.init(fresh.params)
        direction = state.numbers.direction(3)
        loss, derivative = differentiate_forward(tuner, state, batch, direction)
        leaves = {n: t.clone().requires_grad_() for n, t in fresh.params.items()}
        by_hand = answer_nats(attached, attached.get_output_embeddings(), leaves, batch).mean()
        by_hand.backward()
    expected = 0.0
    for n, place in state.numbers.places.items():
        gradient = leaves[n].grad.reshape(-1).numpy()
        gradient = gradient[mask.indices[n].numpy()] if mask else gradient
        expected += float(gradient @ reference_signs(3, place, len(gradient)))
    assert loss == pytest.approx(float(by_hand.detach()), rel=1e-5)
    assert derivative == pytest.approx(expected, rel=1e-3, abs=1e-6)


def test_an_operation_without_forward_derivative_is_one_clear_error() -> None:
    class NoForwardDerivative(Linear):
        def __call__(self, model: Any, params: Any, batch: Any) -> ExampleLosses:
            distances = torch.cdist(params["w"][:, None], params["w"][:, None] + 1)
            return ExampleLosses(sums=distances.sum()[None].double(), counts=torch.ones(1))

    tuner, state = linear_tuner(forward_mode=True)
    tuner.objective = NoForwardDerivative()
    with pytest.raises(InputError, match="Holder has an operation without forward derivative"):
        tuner.step(state, None)


@pytest.mark.parametrize(
    ("backbone", "name", "forward_mode"),
    [
        *(("llama", name, forward_mode) for name in ATTACHABLES for forward_mode in (False, True)),
        *(("gpt2", name, False) for name in ATTACHABLES),
    ],
    indirect=["backbone"],
)
def test_it_learns_and_leaves_the_backbone_unharmed(
    backbone: Backbone, examples: list[EncodedExample], name: str, forward_mode: bool
) -> None:
    before = {n: p.detach().clone() for n, p in backbone.model.named_parameters()}
    base, fresh = target_nats(backbone, examples).mean(), ATTACHABLES[name](backbone.model)
    given = {n: tensor.clone() for n, tensor in fresh.params.items()}
    config = ForwardGradientConfig(
        loop=LoopConfig(epochs=4, learning_rate={"lora": 0.15, "bottleneck": 0.2}[name], warmup_fraction=0.0),
        forward_mode=forward_mode,
        max_variance={"lora": 5.0, "bottleneck": 0.5}[name],
        num_batch_sequences=16,
    )
    result = tune_forward_gradient(backbone, fresh, examples, config)
    assert all(torch.equal(p, before[n]) for n, p in backbone.model.named_parameters())
    assert all(torch.equal(fresh.params[n], given[n]) for n in given)
    with replace(fresh, params=result.params).attach(backbone.model):
        assert target_nats(backbone, examples).mean() < base - 0.1


@on_one_architecture
def test_an_interrupted_and_resumed_run_gives_the_same_weights(
    tmp_path: Path, backbone: Backbone, examples: list[EncodedExample]
) -> None:
    """Interrupted while directions wait."""
    config = ForwardGradientConfig(
        loop=LoopConfig(epochs=4, learning_rate=0.02, checkpoint_interval_s=0.0),
        max_variance=1e-9,
        num_perturbations=2,
        max_perturbations=6,
        num_batch_sequences=4,
    )

    def interrupt(progress: LoopProgress) -> None:
        if progress.step == 8:
            raise KeyboardInterrupt

    fresh = ATTACHABLES["lora"](backbone.model)
    with pytest.raises(KeyboardInterrupt):
        tune_forward_gradient(backbone, fresh, examples, config, run_dir=tmp_path, progress=interrupt)
    resumed, whole = (
        tune_forward_gradient(backbone, fresh, examples, config, heldout=(), **options).params
        for options in ({"run_dir": tmp_path, "resume": True}, {})
    )
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)
    assert not all(torch.equal(whole[name], fresh.params[name]) for name in whole)


@pytest.mark.parametrize("forward_mode", [False, True])
def test_a_non_finite_loss_changes_nothing(forward_mode: bool) -> None:
    tuner, state = linear_tuner(forward_mode=forward_mode, max_variance=1e-9)
    state, _ = tuner.step(state, None)
    slopes = list(state.slopes)

    class Breaks(Linear):
        def __call__(self, model: Any, params: Any, batch: Any) -> ExampleLosses:
            losses = super().__call__(model, params, batch)
            return ExampleLosses(sums=losses.sums * torch.nan, counts=losses.counts)

    tuner.objective = Breaks()
    with pytest.raises(NonFiniteLossError, match="the loss at step 1"):
        tuner.step(state, None)
    assert state.params["w"].tolist() == [0, 1, 2, 3, 4] and state.slopes == slopes and state.num_steps == 1


@pytest.mark.parametrize(
    "changes",
    [
        {"zo_eps": 0.0},
        {"num_perturbations": 1},
        {"max_perturbations": 3},
        {"max_variance": 0.0},
        {"max_variance": math.nan},
        {"num_batch_sequences": 0},
        {"seed": -1},
    ],
)
def test_bad_settings_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=f"{next(iter(changes))} is"):
        ForwardGradientConfig(**changes)

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from cotune.errors import InputError
from cotune.tuning.feature_set import FeatureSet
from cotune.tuning.gate import GateConfig, GateData, quality_curve, tune_gate
from cotune.tuning.gate_inputs import GATE_INPUTS, base_entropy, base_margin, base_top, gate_inputs
from cotune.tuning.loop import LoopConfig
from cotune.tuning.side_evaluation import SideEvaluation

VOCAB = 40


def test_entropy_and_margin_by_hand(draw_world: Callable[..., Any]) -> None:
    features = draw_world(2, 0).features(3)
    # p = 1/2, 1/4, 1/8 are known; 1/8 is left for 37 others. And one position that is certain.
    features.top_logits[:] = np.log([[0.25, 0.5, 0.125], [1e-30, 1.0, 1e-30]])
    features.log_normalizer[:] = 0
    expected = 0.5 * np.log(2) + 0.25 * np.log(4) + 0.125 * np.log(8) + 0.125 * np.log(8 * 37)
    assert base_entropy(features, VOCAB)[:, 0] == pytest.approx([expected, 0.0], abs=1e-6)
    assert base_margin(features, VOCAB)[0, 0] == pytest.approx(np.log(2))
    assert base_margin(features, VOCAB)[1, 0] == pytest.approx(50.0)


def test_all_logits_give_the_exact_entropy(draw_world: Callable[..., Any]) -> None:
    world = draw_world(50, 0)
    log_p = world.logits - np.log(np.exp(world.logits).sum(axis=1, keepdims=True))
    entropy = base_entropy(world.features(VOCAB), VOCAB)[:, 0]
    np.testing.assert_allclose(entropy, -(np.exp(log_p) * log_p).sum(axis=1), rtol=1e-5)
    top = base_top(world.features(VOCAB), VOCAB)
    np.testing.assert_allclose(top, -np.sort(-log_p, axis=1)[:, :8], rtol=1e-5)
    assert (base_entropy(world.features(8), VOCAB)[:, 0] > entropy).mean() > 0.9, "an even tail is the most doubtful"


@pytest.mark.parametrize(
    ("choice", "extra"),
    [("hidden", 0), ("hidden+entropy", 1), ("hidden+margin", 1), ("hidden+top_k", 8), ("hidden+all", 10)],
)
def test_the_hidden_state_comes_first(draw_world: Callable[..., Any], choice: str, extra: int) -> None:
    features = draw_world(30, 0).features(10)
    inputs = gate_inputs(features, choice, VOCAB)
    assert inputs.dtype == np.float16 and inputs.shape == (30, features.hidden.shape[1] + extra)
    np.testing.assert_array_equal(inputs[:, : features.hidden.shape[1]], features.hidden)
    assert np.isfinite(inputs).all()


def doubtful(world: Any) -> tuple[FeatureSet, SideEvaluation]:
    """The device helps where the base model doubts, which the hidden state does not tell."""
    features = world.features(VOCAB)
    entropy = base_entropy(features, VOCAB)[:, 0]
    helps = entropy > np.median(entropy)
    zeros = np.zeros(len(features), np.int64)
    evaluation = SideEvaluation(
        base_nats=np.full(len(features), 1.0, np.float32),
        side_nats=np.where(helps, 0.2, 1.8).astype(np.float32),
        base_argmax=zeros,
        side_argmax=zeros,
        is_certified=zeros.astype(np.bool_),
        target_ids=zeros,
    )
    return features, evaluation


@pytest.mark.parametrize("choice", list(GATE_INPUTS))
def test_quality_against_m_gets_better_with_what_matters(draw_world: Callable[..., Any], choice: str) -> None:
    loop = LoopConfig(epochs=60, learning_rate=0.05)
    config = GateConfig(loop=loop, weight_decay=0.0, objective="marginal", units=0)
    (features, evaluation), (other, judged) = (doubtful(draw_world(600, seed)) for seed in (0, 1))
    result = tune_gate(GateData(gate_inputs(features, choice, VOCAB), evaluation), config)
    curve = quality_curve(result.gate, GateData(gate_inputs(other, choice, VOCAB), judged))
    half = min(curve, key=lambda point: abs(point.consult_rate - 0.5)).nats_per_token
    # By chance half of the helped and half of the harmed are asked, 1.0; at best all of the helped, 0.6.
    if choice == "hidden":
        assert half > 0.9
    elif choice in ("hidden+entropy", "hidden+all"):
        assert half < 0.68
    else:
        assert half < 0.85


def test_unknown_choices_and_too_few_logits_are_refused(draw_world: Callable[..., Any]) -> None:
    features = draw_world(30, 0).features(4)
    with pytest.raises(InputError, match="gate inputs are 'mood', expected one of hidden"):
        gate_inputs(features, "mood", VOCAB)
    with pytest.raises(InputError, match="there are 4 base logits"):
        gate_inputs(features, "hidden+all", VOCAB)
    one = dataclasses.replace(features, top_logits=features.top_logits[:, :1])
    with pytest.raises(InputError, match="expected at least 2"):
        gate_inputs(one, "hidden+margin", VOCAB)

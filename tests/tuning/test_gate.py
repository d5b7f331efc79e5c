from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cotune.errors import InputError
from cotune.generation.gate import Gate
from cotune.tuning.gate import (
    GateConfig,
    GateData,
    choose_threshold,
    decision_table,
    marginal_nats,
    quality_curve,
    tune_gate,
)
from cotune.tuning.loop import LoopConfig, LoopProgress
from cotune.tuning.side_evaluation import SideEvaluation

CONFIG = GateConfig(
    loop=LoopConfig(epochs=20, learning_rate=0.05, checkpoint_interval_s=0.0),
    objective="marginal",
    units=0,
    num_batch_positions=80,
)
SHAPES = [(objective, units) for objective in ("marginal", "choice") for units in (0, 16)]


def evaluation_of(p0: list[float], p1: list[float], choices: list[tuple[int, int]] | None = None) -> SideEvaluation:
    pairs = np.array(choices or [(0, 0)] * len(p0), np.int64)
    return SideEvaluation(
        base_nats=-np.log(np.array(p0, np.float32)),
        side_nats=-np.log(np.array(p1, np.float32)),
        base_argmax=pairs[:, 0],
        side_argmax=pairs[:, 1],
        is_certified=np.ones(len(p0), np.bool_),
        target_ids=np.zeros(len(p0), np.int64),
    )


def draw_data(num: int, seed: int) -> GateData:
    """The device helps where feature 0 is positive; features have offsets and sizes of their own."""
    rng = np.random.default_rng(seed)
    hidden = (rng.standard_normal((num, 5)) * [3, 0.1, 1, 20, 0] + [1, 5, 0, -30, 2]).astype(np.float16)
    helps = hidden[:, 0].astype(np.float32) > 1
    choices = [(0, int(one)) for one in helps]
    return GateData(hidden, evaluation_of(np.full(num, 0.3).tolist(), np.where(helps, 0.6, 0.1).tolist(), choices))


@pytest.mark.parametrize(
    ("p0", "p1", "score", "price"), [(0.2, 0.6, 0.3, 0.1), (0.5, 0.1, -1.0, 0.0), (0.4, 0.4, 2.0, 0.5)]
)
def test_loss_and_gradient_are_those_of_the_formula(p0: float, p1: float, score: float, price: float) -> None:
    # dL/da = -pi (1 - pi) (p1 - p0) / p_mix + lambda pi (1 - pi)
    pi = 1 / (1 + math.exp(-score))
    mixture = (1 - pi) * p0 + pi * p1
    a = torch.tensor([score], dtype=torch.float64, requires_grad=True)
    base, side = (torch.tensor([-math.log(p)], dtype=torch.float64) for p in (p0, p1))
    loss = marginal_nats(a, base, side, price)
    loss.backward()  # type: ignore[no-untyped-call]
    assert loss.item() == pytest.approx(-math.log(mixture) + price * pi)
    assert a.grad is not None
    assert a.grad.item() == pytest.approx(-pi * (1 - pi) * (p1 - p0) / mixture + price * pi * (1 - pi))


def test_probabilities_of_zero_stay_finite() -> None:
    nats = torch.tensor([200.0, 0.0, 200.0]), torch.tensor([0.0, 200.0, 200.0])
    score = torch.tensor([90.0, -90.0, 0.0], requires_grad=True)
    loss = marginal_nats(score, *nats, 0.1)
    loss.sum().backward()
    assert torch.isfinite(loss).all()
    assert score.grad is not None
    assert torch.isfinite(score.grad).all()


@pytest.mark.parametrize(("objective", "units"), SHAPES)
def test_the_gate_learns_where_the_device_helps(objective: str, units: int) -> None:
    loop = LoopConfig(epochs=50, learning_rate=0.05)
    config = replace(CONFIG, loop=loop, weight_decay=0.0, objective=objective, units=units)
    result = tune_gate(draw_data(800, 0), config, heldout=draw_data(300, 1))
    heldout = draw_data(300, 2)
    asks = np.array([result.gate.consults(row.astype(np.float32)) for row in heldout.hidden])
    helps = heldout.evaluation.side_nats < heldout.evaluation.base_nats
    assert (asks == helps).mean() > 0.95
    assert result.curve[-1].heldout_loss < result.curve[0].heldout_loss  # type: ignore[operator]


def test_the_folded_gate_scores_raw_hidden_states_like_the_trained_one_scored_standardised_ones() -> None:
    # With one step and a learning rate of next to nothing, pi stays at the share of worthwhile positions everywhere.
    data = draw_data(400, 0)
    config = replace(CONFIG, loop=LoopConfig(epochs=1, learning_rate=1e-12))
    gate = tune_gate(data, config).gate
    share = float((data.evaluation.side_nats < data.evaluation.base_nats).mean())
    scores = [gate.score(row.astype(np.float32)) for row in data.hidden]
    assert scores == pytest.approx([math.log(share / (1 - share))] * 400, abs=1e-5)
    # Trained, the mean score over the training positions is the bias before folding: the features' means drop out.
    trained = tune_gate(data, CONFIG).gate
    mean = data.hidden.astype(np.float64).mean(axis=0).astype(np.float32)
    scores = [trained.score(row.astype(np.float32)) for row in data.hidden]
    assert trained.score(mean) == pytest.approx(np.mean(scores), abs=1e-3)


@pytest.mark.parametrize("units", [0, 16])
def test_the_folded_gate_is_the_trained_one(units: int) -> None:
    data, heldout = draw_data(400, 0), draw_data(300, 1)
    result = tune_gate(data, replace(CONFIG, objective="choice", units=units), heldout=heldout)
    scores = torch.tensor([result.gate.score(row.astype(np.float32)) for row in heldout.hidden])
    differs = torch.from_numpy(heldout.evaluation.disagrees).double()
    nats = torch.nn.functional.binary_cross_entropy_with_logits(scores, differs)
    # float16 weights of the layer move it a little.
    assert nats.item() == pytest.approx(result.curve[result.best_epoch].heldout_loss, abs=1e-5 if units == 0 else 2e-3)


def test_only_a_layer_finds_what_two_features_say_together() -> None:
    def data(seed: int) -> GateData:
        hidden = np.random.default_rng(seed).standard_normal((1500, 4)).astype(np.float16)
        choices = [(0, int(row[0] * row[1] > 0)) for row in hidden]
        return GateData(hidden, evaluation_of([0.5] * 1500, [0.5] * 1500, choices))

    right = {}
    for units in (0, 16):
        config = replace(CONFIG, loop=LoopConfig(epochs=60, learning_rate=0.05), objective="choice", units=units)
        gate, heldout = tune_gate(data(0), config).gate, data(1)
        asks = np.array([gate.consults(row.astype(np.float32)) for row in heldout.hidden])
        right[units] = (asks == heldout.evaluation.disagrees).mean()
    assert right[0] < 0.6
    assert right[16] > 0.9


def test_units_of_the_hidden_state_do_not_matter() -> None:
    data, config = draw_data(400, 0), replace(CONFIG, loop=LoopConfig(epochs=3, learning_rate=0.05))
    other = GateData((data.hidden * np.array([8, 2, 0.25, 4, 1])).astype(np.float16), data.evaluation)
    scores = [
        [gate.score(row.astype(np.float32)) for row in part.hidden]
        for part in (data, other)
        for gate in (tune_gate(part, config).gate,)
    ]
    assert max(scores[0]) - min(scores[0]) > 1
    assert scores[0] == pytest.approx(scores[1], abs=1e-3)


def test_a_higher_price_asks_less() -> None:
    data = draw_data(800, 0)
    rates = [
        quality_curve_rate(tune_gate(data, replace(CONFIG, price_nats=price)).gate, data) for price in (0.0, 0.3, 3.0)
    ]
    assert rates[0] >= rates[1] > rates[2]
    assert rates[2] < 0.1


def quality_curve_rate(gate: Gate, data: GateData) -> float:
    table = decision_table(gate, data)
    return table["asks_and_differs"] + table["asks_and_agrees"]


def test_an_interrupted_and_resumed_run_gives_the_same_gate(tmp_path: Path) -> None:
    data = draw_data(500, 0)

    def interrupt(progress: LoopProgress) -> None:
        if progress.step == 8:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tune_gate(data, CONFIG, run_dir=tmp_path, progress=interrupt)
    resumed, whole = tune_gate(data, CONFIG, run_dir=tmp_path, resume=True).gate, tune_gate(data, CONFIG).gate
    np.testing.assert_array_equal(resumed.weight, whole.weight)
    assert resumed.bias == whole.bias
    with pytest.raises(InputError, match="another config or other data"):
        tune_gate(data, replace(CONFIG, price_nats=1.0), run_dir=tmp_path, resume=True)


# Four positions with scores 3, 2, 2, -1; base loses 2, 2, 1, 1 nats, the device 0, 1, 2, 1.
HAND_GATE = Gate(weight=np.array([1.0], np.float32), bias=0.0)
HAND_DATA = GateData(
    np.array([[3], [2], [2], [-1]], np.float16),
    evaluation_of(
        [math.exp(-2), math.exp(-2), math.exp(-1), math.exp(-1)],
        [1.0, math.exp(-1), math.exp(-2), math.exp(-1)],
        [(1, 2), (1, 1), (3, 4), (5, 6)],
    ),
)


def test_the_quality_curve_by_hand() -> None:
    curve = quality_curve(HAND_GATE, HAND_DATA)
    # Nobody asks: 6/4. Score 3 asks: 4/4. All scores of 2 ask together: (0 + 1 + 2 + 1)/4. All ask: the same.
    assert [point.consult_rate for point in curve] == [0.0, 0.25, 0.75, 1.0]
    assert [point.nats_per_token for point in curve] == pytest.approx([1.5, 1.0, 1.0, 1.0])
    for point in curve:
        gate = replace(HAND_GATE, threshold=point.threshold)
        asks = [gate.consults(row.astype(np.float32)) for row in HAND_DATA.hidden]
        assert np.mean(asks) == point.consult_rate


def test_the_quality_curve_of_many_positions_keeps_its_ends_and_its_order(draw_world: Callable[..., Any]) -> None:
    data = draw_data(500, 3)
    gate = Gate(weight=np.ones(5, np.float32))
    curve = quality_curve(gate, data, num_points=11)
    rates = [point.consult_rate for point in curve]
    assert (rates[0], rates[-1], len(rates)) == (0.0, 1.0, 11)
    assert rates == sorted(rates)
    assert curve[0].nats_per_token == pytest.approx(float(data.evaluation.base_nats.mean()), rel=1e-5)
    assert curve[-1].nats_per_token == pytest.approx(float(data.evaluation.side_nats.mean()), rel=1e-5)


def test_the_threshold_follows_the_limit() -> None:
    curve = quality_curve(HAND_GATE, HAND_DATA)
    assert choose_threshold(curve, max_consult_rate=0.2).consult_rate == 0.0
    assert choose_threshold(curve, max_consult_rate=0.8).consult_rate == 0.25
    assert choose_threshold(curve, max_quality_loss=0.0).consult_rate == 0.25
    assert choose_threshold(curve, max_quality_loss=0.5).consult_rate == 0.0


def test_the_decision_table_by_hand() -> None:
    table = decision_table(replace(HAND_GATE, threshold=2.5), HAND_DATA)
    assert table == {
        "asks_and_differs": 0.25,
        "asks_and_agrees": 0.0,
        "passes_and_differs": 0.5,
        "passes_and_agrees": 0.25,
    }


@pytest.mark.parametrize(
    "limits",
    [{}, {"max_consult_rate": 0.1, "max_quality_loss": 0.1}, {"max_consult_rate": 1.5}, {"max_quality_loss": -1.0}],
)
def test_unclear_limits_are_refused(limits: dict[str, float]) -> None:
    with pytest.raises(InputError, match="max_"):
        choose_threshold(quality_curve(HAND_GATE, HAND_DATA), **limits)


@pytest.mark.parametrize(
    "changes",
    [
        {"objective": "best"},
        {"units": 65},
        {"units": -1},
        {"price_nats": -0.1},
        {"num_batch_positions": 0},
        {"weight_decay": -1.0},
        {"max_grad_norm": 0.0},
    ],
)
def test_bad_settings_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=next(iter(changes))):
        GateConfig(**changes)


def test_arrays_that_do_not_belong_together_are_refused() -> None:
    with pytest.raises(InputError, match="3 hidden states and 2 evaluated"):
        GateData(np.zeros((3, 2), np.float16), evaluation_of([0.1, 0.2], [0.1, 0.2]))

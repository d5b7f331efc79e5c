"""The cost of a run beside its prediction."""

from __future__ import annotations

from pathlib import Path

import pytest

from cotune.cli.plan_command import COMMANDS
from cotune.evaluation import measured_memory
from cotune.evaluation.measured_memory import PeakMeter
from cotune.evaluation.method_cost import MethodSettings, predict_cost, quantised_bytes
from cotune.evaluation.model_shape import ModelShape
from cotune.evaluation.tuning_cost import PLANNED, RunCost, predict_run
from cotune.evaluation.workload import Workload

CONFIG = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 500,
}
LOAD, SETTINGS = Workload(batch=2, length=32), MethodSettings(rank=3)


def test_the_words_are_those_with_which_the_planner_says_how_to_run_it() -> None:
    for (method, estimator), planned in PLANNED.items():
        words = COMMANDS[planned, False].split()
        assert words[words.index("--method") + 1] == method
        assert ("--estimator" in words) == (estimator != "backprop") and (estimator in words or estimator == "backprop")


def test_a_prediction_is_the_planners_without_the_models_weights() -> None:
    shape = ModelShape.from_config(CONFIG)
    found = predict_run(CONFIG, "lora", "backprop", LOAD, SETTINGS, has_checkpoints=True)
    cost = predict_cost(shape, "lora", LOAD, SETTINGS, has_checkpoints=True)
    assert found is not None
    assert (found.peak_bytes, found.flops) == (cost.peak - 4 * shape.num_parameters, cost.flops)
    low = predict_run(CONFIG, "lora", "backprop", LOAD, SETTINGS, base_bits=4)
    assert low is not None
    assert low.peak_bytes == predict_cost(shape, "qlora", LOAD, SETTINGS).peak - quantised_bytes(shape, LOAD, 4)


@pytest.mark.parametrize(
    ("config", "method", "estimator", "base_bits"),
    [
        ({"model_type": "gpt2"}, "lora", "backprop", None),
        (CONFIG, "blocks", "backprop", None),
        (CONFIG, "prefix", "zeroth_order", None),
        (CONFIG, "full", "backprop", 4),
    ],
)
def test_what_the_planner_does_not_know_has_none(
    config: dict[str, object], method: str, estimator: str, base_bits: int | None
) -> None:
    assert predict_run(config, method, estimator, LOAD, SETTINGS, base_bits=base_bits) is None


def test_rates_by_hand() -> None:
    cost = RunCost(num_steps=4, num_tokens=600, seconds=1.5, peak_bytes=None, predicted=None)
    assert cost.tokens_per_s == 400
    assert RunCost(num_steps=0, num_tokens=0, seconds=0.0, peak_bytes=1, predicted=None).tokens_per_s is None


def test_a_meter_follows_the_process_or_says_that_it_cannot(monkeypatch: pytest.MonkeyPatch) -> None:
    meter = PeakMeter()
    if (before := meter.read()) is not None:
        block = bytearray(b"x") * 60_000_000
        assert before < 30_000_000 < (meter.read() or 0) and len(block) == 60_000_000
    monkeypatch.setattr(measured_memory, "_CLEAR", Path("/nowhere/clear_refs"))
    assert PeakMeter().read() is None

from __future__ import annotations

import re

import pytest

from cotune.evaluation import plots
from cotune.evaluation.plots import Bar, plot_bars


def test_bars_tell_their_numbers_to_a_screen_reader() -> None:
    bars = [Bar(label="base", value=0.2, text="0.200", series=0, interval=(0.1, 0.3))]
    svg = plot_bars("b", bars, "Rouge-L")
    assert 'aria-label="Bar plot, Rouge-L. base: 0.200."' in svg
    assert ">0.200</text>" in svg


@pytest.mark.parametrize("value", [0.0, 1e-9, 1e12])
def test_bars_of_any_height(value: float) -> None:
    assert "<svg" in plot_bars("b", [Bar(label="x", value=value, text="t", series=0)], "Bytes")


def test_long_and_odd_labels_are_shown_short() -> None:
    bars = [Bar(label="_" + "long " * 30, value=1.0, text="1", series=0)]
    svg = plot_bars("b", bars, "x")
    assert "_long long long long long l…</text>" in svg


def test_perplexities_far_apart_get_a_log_axis() -> None:
    near = plots.plot_perplexity([{"name": "base", "perplexity": 40.0}, {"name": "plugin", "perplexity": 5.0}])
    far = plots.plot_perplexity([{"name": "base", "perplexity": 4000.0}, {"name": "plugin", "perplexity": 5.0}])
    assert "log scale" not in near
    assert "log scale" in far
    assert "<svg" in plots.plot_perplexity([{"name": "base", "perplexity": 1.0}])


def test_quality_leaves_out_what_was_not_measured() -> None:
    svg = plots.plot_quality([{"name": "base", "rouge_l": 0.2}, {"name": "x", "rouge_l": None}])
    assert "Base model: 0.200." in svg


def test_speed_draws_predictions_only_where_given() -> None:
    measured = {"schedule": "blocking", "rtt_ms": 0.0, "tokens_per_s": 9.0}
    assert "predicted" not in plots.plot_speed({"blocking": [measured]})  # type: ignore[list-item]
    predicted = measured | {"predicted_tokens_per_s": 10.0}
    assert "predicted: 1 / (c + M R)" in plots.plot_speed({"_b": [predicted]})  # type: ignore[list-item]


def test_gate_names_its_quality_and_the_choice() -> None:
    svg = plots.plot_gate(
        [
            {"threshold": 1.0, "M": 0.6, "nats_per_token": 1.5, "chosen": True},
            {"threshold": 2.0, "M": 0.1, "nats_per_token": 2.5},
        ]
    )
    assert "Nats per token (lower is better) against M. 2.50 at M = 0.100, 1.50 at M = 0.600" in svg
    assert ">chosen</text>" in svg


def test_training_of_one_step_and_of_many() -> None:
    svg = plots.plot_training(
        "t", "step", [{"name": "a", "points": [(0, 2.0)]}, {"name": "b", "points": [(0, 3.0), (9, 1.0)]}]
    )
    assert "a: from 2.00 to 2.00. b: from 3.00 to 1.00." in svg


def test_whole_steps_have_whole_ticks_and_parts_of_epochs_have_not() -> None:
    def ticks(*steps: float) -> list[str]:
        svg = plots.plot_training("t", "epoch", [{"name": "a", "points": [(step, 2.0 + step) for step in steps]}])
        return re.findall(r">([0-9.]+)</text>", svg.split("Epoch")[0])

    assert [one for one in ticks(0, 1, 2, 3) if "." in one] == []
    assert [one for one in ticks(0, 0.5, 1) if "." in one] != []

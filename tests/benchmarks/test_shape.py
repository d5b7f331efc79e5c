"""The steps that are compared are the same pass; the arithmetic around them by hand; the whole command once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import shape
from batch_step import PLAIN, TAPS, THEIRS, BatchStep
from shape import count_bytes, make_args, measure_cell, median_interval, run_rounds, scaled, summarise
from split_layers import LayerShape
from tiny_models import ARCHITECTURES, tiny_backbone

from cotune.errors import InputError


@pytest.mark.parametrize("architecture", list(ARCHITECTURES))
def test_steps_with_and_without_taps_are_the_same_pass(architecture: str) -> None:
    backbone = tiny_backbone(architecture)
    step = BatchStep(backbone, batch=3, context=70, seed=0)
    with_taps, without = step.features(), step.logits()
    assert len(with_taps) == len(without) == 3
    for features, logits in zip(with_taps, without, strict=True):
        assert np.array_equal(features.logits, logits)
        assert features.taps.shape == (4, 24)
    # Each row has a cache of its own, and the step leaves everything as it was.
    assert not np.array_equal(without[0], without[1])
    assert np.array_equal(step.logits()[0], without[0])
    assert all(call() > 0 for call in step.calls(theirs=True).values())
    assert np.array_equal(step.logits()[0], without[0])
    step.close()
    assert backbone.kv_pool.num_used == 0


def test_a_cell() -> None:
    args = make_args(["--rounds", "3", "--warm-up", "1"])
    short = tiny_backbone("llama")
    cell = measure_cell(tiny_backbone("llama"), short, batch=2, context=64, num_layers=9, args=args)
    assert cell["is_scaled"]
    assert set(cell["ms"]) == {TAPS, PLAIN, THEIRS}
    assert cell["num_rounds"] == 3


def test_rounds_time_everything_in_turns() -> None:
    calls: list[str] = []

    def timed(name: str) -> Any:
        def call() -> float:
            calls.append(name)
            return 0.002 if name == "a" else 0.001

        return call

    found = run_rounds({"a": timed("a"), "b": timed("b")}, rounds=20, seconds=60, warm_up=2, seed=0)
    assert found == {"a": [2.0] * 20, "b": [1.0] * 20}
    turns = [calls[i : i + 2] for i in range(0, len(calls), 2)]
    assert len(turns) == 22
    assert all(sorted(turn) == ["a", "b"] for turn in turns)
    assert {tuple(turn) for turn in turns} == {("a", "b"), ("b", "a")}


def test_the_interval_of_a_median_is_between_sorted_values() -> None:
    # Of 20 values the 6th and the 15th: P(less than 6 on one side) = 2 * 21,700 / 2^20 = 0.0414.
    assert median_interval([float(i) for i in range(20, 0, -1)]) == (6.0, 15.0)
    assert median_interval([3.0]) == (3.0, 3.0)


def test_scaling_by_hand() -> None:
    # 2 ms and 3 ms for each layer.
    assert scaled(5.0, 8.0, num_some=2, num_all=32) == 98.0
    times = {TAPS: [8.5, 8.5], PLAIN: [8.0, 8.0], f"{TAPS}, 1 layer": [5.3, 5.3], f"{PLAIN}, 1 layer": [5.0, 5.0]}
    row = summarise(times, 2, 32)
    assert row["is_scaled"]
    assert row["ms"][PLAIN].median == pytest.approx(98)
    assert row["ms"][TAPS].median == pytest.approx(5.3 + 31 * 3.2)
    assert row["taps_percent"]["median"] == pytest.approx(100 * (104.5 / 98 - 1))
    assert row["taps_percent"]["low"] == pytest.approx(row["taps_percent"]["high"])
    assert row["measured_taps_percent"]["median"] == pytest.approx(100 * 0.5 / 8)
    whole = summarise({TAPS: [2.0, 3.0], PLAIN: [1.0, 2.0]}, 4, 4)
    assert not whole["is_scaled"]
    assert whole["taps_percent"]["median"] == pytest.approx(75)


def test_bytes_are_those_of_the_frames() -> None:
    features = BatchStep(tiny_backbone("llama"), 1, 64, 0).features()[0]
    layers = LayerShape(num_layers=32, hidden_size=4096, q_width=4096, kv_width=4096)
    found = count_bytes(features, layers)
    # Header, token, and for each of 4 taps 24 codes and a scale; header, count, token and flags.
    assert found["taps"]["down"] >= 16 + 4 * 26 + 16
    assert found["taps"]["up"] == 16 + 96 + 2
    assert (found["LoRA"]["down"], found["LoRA"]["up"]) == layers.bytes_per_token("lora")
    assert (found["Adapter"]["down"], found["Adapter"]["up"]) == layers.bytes_per_token("adapter")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--layers", "1"], "two points"),
        (["--batch", "0"], "expected 1 or more"),
        (["--rtt-ms", "1"], "as many of the first"),
        (["--gate-rate", "1.5"], "0 to 1"),
    ],
)
def test_bad_options_are_refused(words: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        make_args(words)


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    config = {**ARCHITECTURES["llama"], "model_type": "llama", "num_hidden_layers": 5}
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    words = ["--config", str(tmp_path / "config.json"), "--layers", "2", "--batch", "2", "--context", "64"]
    out = tmp_path / "out.json"
    monkeypatch.setattr("sys.argv", ["shape.py", *words, "--rounds", "2", "--part-runs", "1", "--out", str(out)])
    monkeypatch.setattr(shape.torch, "set_num_threads", lambda num: None)
    shape.main()
    printed = capsys.readouterr().out
    assert "SCALED to 5 layers" in printed
    assert "no verdict on a CPU" in printed
    results = json.loads(out.read_text(encoding="utf-8"))["results"]
    assert (results["num_layers"], results["num_layers_measured"]) == (5, 2)
    first, second = results["table_1"]
    assert [row["name"] for row in first] == ["LoRA", "Adapter", "LST", "SPA"]
    assert [row["trips"] for row in first] == [5, 10, 1.0, 0.62]
    assert all(a["network_s"] < b["network_s"] for a, b in zip(first, second, strict=True))
    assert str(tmp_path) not in out.read_text(encoding="utf-8").replace(str(out), "")

"""Predictions worked out by hand, from measured parts alone, and how much each cell reads."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from network import (
    METHODS,
    WHOLE_TEXTS,
    Turn,
    make_args,
    num_tokens_for,
    plot,
    predict,
    predict_optimistic,
    predict_paper,
    summarise,
)
from split_layers import LayerShape

from cotune.errors import CotuneError, InputError

SHAPE = LayerShape(num_layers=6, hidden_size=192, q_width=192, kv_width=64)
PARTS: dict[str, Any] = {
    "step_ms": 6.0,
    "device_ms": 1.0,
    "trips": 0.5,
    "changed_rate": 0.1,
    "stall_ms": 0.0,
    "wasted_rate": 1.0,
    "ping_ms": 36.0,
}
TURN = Turn(
    num_tokens=3, tokens_per_s=50.0, first_token_ms=9.0, bytes_down=1000.0, bytes_up=250.0, text_bytes=1, **PARTS
)


def test_equations_3_to_5_by_hand() -> None:
    # 1 ms on the device, 6 in the cloud, 0.5 trips of 34 ms, 1250 bytes of which each takes 8 us.
    assert predict_paper(TURN, rtt_ms=34, mbps=1) == pytest.approx(1e3 / (1 + 6 + 17 + 10))
    assert predict_paper(TURN, rtt_ms=34, mbps=1, trips=2) == pytest.approx(1e3 / (1 + 6 + 68 + 10))


def test_c_and_q_r_by_hand() -> None:
    # Half of the bytes were wasted: R = 34 + 1 + 4 + 1 ms.
    assert predict_optimistic(TURN, rtt_ms=34, mbps=1) == pytest.approx(1e3 / (6 + 0.1 * 40))
    # The network sets the pace: 500 bytes take 40 ms, 125 take 10.
    assert predict_optimistic(TURN, rtt_ms=34, mbps=0.1) == pytest.approx(1e3 / (40 + 0.1 * (34 + 1 + 40 + 10)))


@pytest.mark.parametrize("method", METHODS)
def test_no_prediction_looks_at_the_measured_rate(method: str) -> None:
    other = replace(TURN, tokens_per_s=1.0, first_token_ms=1.0, stall_ms=99.0, num_tokens=7, text_bytes=5)
    assert predict(method, other, 50, 10) == predict(method, TURN, 50, 10)


def test_rates_and_bytes_leave_the_first_token_out() -> None:
    turn = Turn.of([1.0, 1.5, 2.0], [(700, 70), (800, 75), (1000, 90)], 5000, **PARTS)
    assert (turn.num_tokens, turn.tokens_per_s, turn.first_token_ms) == (3, 2.0, 1000.0)
    assert (turn.bytes_down, turn.bytes_up, turn.text_bytes) == (150.0, 10.0, 5000)
    with pytest.raises(CotuneError, match="1 tokens has no rate"):
        Turn.of([1.0], [(1, 1)], 2, **PARTS)


def test_summary_compares_turn_by_turn() -> None:
    turns = [TURN, replace(TURN, tokens_per_s=25.0)]
    row = summarise("spa", 34.0, 1.0, turns)
    predicted = 1e3 / 34
    assert row["predicted_tokens_per_s"].median == pytest.approx(predicted)
    assert row["of_prediction"].median == pytest.approx(37.5 / predicted)
    assert row["predicted_with_ping_tokens_per_s"].median == pytest.approx(1e3 / 35)
    assert row["predicted_by"] == "equations 3 to 5"
    assert set(asdict(TURN)) <= set(row)
    assert summarise("integration, optimistic", 34.0, 1.0, turns)["predicted_by"] == "c + q R"


def test_texts_are_whole_where_they_decide_m_and_q() -> None:
    for method in METHODS:
        num = num_tokens_for(method, 200.0, 10.0, SHAPE, seconds=1.0, most=48)
        assert num == 48 if method in WHOLE_TEXTS else 3 <= num < 48
    # 5 ms, 12 trips of 0.5 ms, and 9600 bytes at 80 ns each way.
    assert num_tokens_for("adapter", 0.0, 100.0, SHAPE, seconds=0.1, most=48) == 8
    assert num_tokens_for("lora", 10_000.0, 1.0, SHAPE, seconds=1.0, most=48) == 3


def test_plot_shows_every_method(tmp_path: Path) -> None:
    spread = {"median": 2.0, "lower_quartile": 1.0, "upper_quartile": 4.0}
    rows = [
        {"mbps": 1.0, "rtt_ms": rtt_ms, "method": method, "tokens_per_s": spread, "predicted_tokens_per_s": spread}
        for rtt_ms in (0.0, 50.0)
        for method in METHODS
    ]
    plot(rows, tmp_path / "plots" / "network.svg")
    text = (tmp_path / "plots" / "network.svg").read_text(encoding="utf-8")
    assert text.startswith("<?xml")
    assert all(f"<!-- {method} -->" in text for method in METHODS)


def test_quick_leaves_what_was_given() -> None:
    args = make_args(["--quick", "--turns", "7"])
    assert (args.rtt_ms, args.mbps, args.turns) == ([0.0, 50.0], [10.0], 7)
    assert make_args([]).rtt_ms == [0, 10, 25, 50, 100, 200]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--plugin", "a"], "ladder needs the second"),
        (["--turns", "0"], "turns is 0"),
        (["--mbps", "0"], "mbps"),
        (["--max-new-tokens", "2"], "at least 3"),
    ],
)
def test_bad_options_are_refused(words: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        make_args(words)

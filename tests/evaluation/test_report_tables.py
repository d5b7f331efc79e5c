from __future__ import annotations

import re

from evaluation.report_example import generation

from cotune.evaluation import report_tables
from cotune.evaluation.report_schema import SpeedRow


def rows_of(page: str) -> list[list[str]]:
    """The text of each cell, row by row."""
    rows = re.findall(r"<tr>(.*?)</tr>", page)
    return [[re.sub(r"<[^>]*>", "", cell) for cell in re.findall(r"<t[hd].*?</t[hd]>", row)] for row in rows]


SPEED: list[SpeedRow] = [
    {"schedule": "gated", "answer": "token", "rtt_ms": 50, "tokens_per_s": 20.0},
    {"schedule": "gated", "answer": "token", "rtt_ms": 0, "tokens_per_s": 90.0},
    {"schedule": "alone", "rtt_ms": 0, "tokens_per_s": 95.0, "bytes_down_per_token": 5, "bytes_up_per_token": 1},
]


def test_series_are_ordered_by_round_trip_time() -> None:
    series = report_tables.speed_series(SPEED)
    assert {name: [row["rtt_ms"] for row in rows] for name, rows in series.items()} == {
        "gated, token": [0, 50],
        "alone": [0],
    }
    two_modes: list[SpeedRow] = [
        {"schedule": "gated", "mode": "spa", "rtt_ms": 0, "tokens_per_s": 1},
        {"schedule": "gated", "mode": "integration", "rtt_ms": 0, "tokens_per_s": 2},
    ]
    assert list(report_tables.speed_series(two_modes)) == ["gated, spa", "gated, integration"]


def test_rates_by_round_trip_time() -> None:
    page = report_tables.rate_table(report_tables.speed_series(SPEED))
    assert rows_of(page) == [
        ["Schedule, answer", "0 ms", "50 ms"],
        ["gated, token", "90.0", "20.0"],
        ["alone", "95.0", "–"],  # noqa: RUF001
    ]
    assert "<strong>95.0</strong>" in page


def test_columns_without_values_are_left_out() -> None:
    assert rows_of(report_tables.speed_table(SPEED))[0] == ["Schedule", "Answer", "RTT, ms", "Tokens/s", "Down", "Up"]
    assert rows_of(report_tables.quality_table([{"name": "base", "perplexity": 3.0}])) == [
        ["Model", "Perplexity"],
        ["Base model", "3.00"],
    ]


def test_best_quality_is_bold() -> None:
    page = report_tables.quality_table(
        [
            {"name": "base", "rouge_l": 0.2, "perplexity": 9.0},
            {"name": "plugin", "mode": "spa", "rouge_l": 0.5, "rouge_l_interval": (0.4, 0.6), "perplexity": 3.0},
        ]
    )
    assert "<strong>0.500</strong> <small>[0.400, 0.600]</small>" in page
    assert "<strong>3.00</strong>" in page
    assert page.count("<strong>") == 2


def test_egress_adds_up() -> None:
    page = report_tables.egress_table({"prompt": {"count": 2, "bytes": 900}, "gate": {"count": 1, "bytes": 100}})
    assert rows_of(page)[-1] == ["All", "3", "1,000"]


def test_bytes_per_token_are_means_over_round_trip_times() -> None:
    speed: list[SpeedRow] = [
        {"schedule": "x", "rtt_ms": t, "tokens_per_s": 1, "bytes_down_per_token": 100 + t, "bytes_up_per_token": 8}
        for t in (0, 100)
    ]
    page = report_tables.bytes_table(speed)
    assert page is not None
    assert rows_of(page)[1] == ["x", "150 B", "8 B"]
    assert report_tables.bytes_table(SPEED[:2]) is None


def test_losses_from_first_to_last() -> None:
    page = report_tables.loss_table(
        [
            {"name": "a", "points": [(0, 3.0), (1, 2.0)], "held_out": [(0, 2.5), (1, 2.25)]},
            {"name": "b", "points": [(0, 1.0)]},
        ]
    )
    assert rows_of(page)[1:] == [["a", "3.00", "2.00", "2.25"], ["b", "1.00", "1.00", "–"]]  # noqa: RUF001


def test_generation_facts_hold_each_number() -> None:
    page = report_tables.generation_facts(generation())
    for words in ("optimistic", "50.0", "0.333", "67 %", "400 B", "100 B", "2.00 ms", "10.0 ms"):
        assert f"<dd>{words}</dd>" in page

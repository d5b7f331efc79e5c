from __future__ import annotations

import re

from evaluation.report_example import generation, report_metrics

from cotune.evaluation.report_cards import key_cards
from cotune.evaluation.report_schema import ReportMetrics, check_report_metrics


def texts(report: ReportMetrics) -> list[str]:
    """The text of each card."""
    cards = re.findall(r'<li class="card">(.*?)</li>', key_cards(report, None))
    return [" ".join(re.sub(r"<[^>]*>", " ", card).split()) for card in cards]


def test_all_cards() -> None:
    report, _ = check_report_metrics(report_metrics())
    assert texts(report) == [
        "Rouge-L, base to plugin 0.200 → 0.500 best mode: spa; LoRA: 0.550",
        "Perplexity, base to plugin 40.0 → 5.00 best mode: spa; LoRA: 4.80",
        "Rate against blocking, 50 ms round trip × 2.50 optimistic: 25.0 tok/s; blocking: 10.0",  # noqa: RUF001
        "Tokens changed by the device 33 % agreed on 33 %, not asked on 33 %",
        "From the cloud per token 400 B and 100 B back",
        "Left the device in all 100 B 1 kind, all in the ledger",
    ]


def test_the_best_mode_has_the_lowest_perplexity() -> None:
    report: ReportMetrics = {
        "title": "t",
        "summary": ["s"],
        "quality": [
            {"name": "base", "perplexity": 9.0},
            {"name": "plugin", "mode": "ladder", "perplexity": 7.0},
            {"name": "plugin", "mode": "integration", "perplexity": 4.0},
        ],
    }
    assert texts(report) == ["Perplexity, base to plugin 9.00 → 4.00 best mode: integration"]


def test_without_a_comparison_the_rate_stands_alone() -> None:
    report: ReportMetrics = {
        "title": "t",
        "summary": ["s"],
        "speed": [{"schedule": "gated", "rtt_ms": 10, "tokens_per_s": 20.0}],
    }
    assert texts(report) == ["At 10 ms round trip 20.0 tok/s gated"]


def test_no_data_no_cards() -> None:
    assert key_cards({"title": "t", "summary": ["s"]}, None) == ""
    assert "Tokens changed" in key_cards({"title": "t", "summary": ["s"]}, generation())

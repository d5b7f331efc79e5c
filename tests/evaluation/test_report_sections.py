from __future__ import annotations

import pytest
from evaluation.report_example import generation, report_metrics

from cotune.evaluation.report_schema import GatePoint, ReportMetrics, check_report_metrics
from cotune.evaluation.report_sections import SECTIONS


@pytest.mark.parametrize("name", list(SECTIONS))
def test_a_section_is_there_exactly_when_its_data_is(name: str) -> None:
    build = SECTIONS[name][2]  # type: ignore[index]
    full, _ = check_report_metrics(report_metrics())
    assert build(full, None)
    assert build({"title": "t", "summary": ["s"]}, None) is None


def test_speed_shows_the_generation_beside_the_report() -> None:
    content = SECTIONS["speed"][2]({"title": "t", "summary": ["s"]}, generation())
    assert content is not None
    assert "One generation in numbers" in content


def test_text_puts_base_and_personal_text_side_by_side() -> None:
    report, _ = check_report_metrics(report_metrics())
    content = SECTIONS["text"][2](report, None)
    assert content is not None
    assert content.index("Base model") < content.index("The office.") < content.index("With the plugin (spa)")
    assert "Mirko." in content


def test_a_long_gate_curve_is_thinned_and_folded_away() -> None:
    points: list[GatePoint] = [
        {"threshold": 5.0 - index / 10, "M": index / 100, "nats_per_token": 3.0, "chosen": index == 3}
        for index in range(101)
    ]
    report: ReportMetrics = {"title": "t", "summary": ["s"], "gate_curve": points}
    content = SECTIONS["gate"][2](report, None)
    assert content is not None
    shown, folded = content.split("All thresholds")
    # Every tenth of M, the chosen one, and the heading.
    assert (shown.count("<tr>"), folded.count("<tr>")) == (1 + 11 + 1, 1 + 101)
    assert shown.count("chosen</span>") == 1
    report["gate_curve"] = points[:12]
    short = SECTIONS["gate"][2](report, None)
    assert short is not None and "All thresholds" not in short and short.count("<tr>") == 13


def test_training_with_two_units_gets_two_plots() -> None:
    report, _ = check_report_metrics(report_metrics())
    content = SECTIONS["training"][2](report, None)
    assert content is not None
    assert content.count("<svg") == 2


def test_nested_configuration_gets_dotted_names() -> None:
    report: ReportMetrics = {"title": "t", "summary": ["s"], "config": {"side": {"width": 32}, "empty": {}}}
    content = SECTIONS["setup"][2](report, None)
    assert content is not None
    assert "<dt>side.width</dt><dd>32</dd>" in content
    assert "empty" not in content

from __future__ import annotations

import pytest
from evaluation.report_example import generation, report_metrics

from cotune.evaluation.report_schema import ReportMetrics, check_report_metrics
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
    assert "<dt>empty</dt><dd>{}</dd>" in content

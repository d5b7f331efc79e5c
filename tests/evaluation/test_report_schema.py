from __future__ import annotations

from typing import Any

import pytest
from evaluation.report_example import generation, report_metrics

from cotune.errors import InputError
from cotune.evaluation.report_schema import check_report_metrics


def test_splits_the_report_from_the_generation_beside_it() -> None:
    report, beside = check_report_metrics(report_metrics() | generation().to_dict())
    assert beside == generation()
    assert report["title"] == "It writes like you"
    assert check_report_metrics(report_metrics())[1] is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"title": " "}, r"metrics\['title'\] is empty"),
        ({"summary": []}, r"metrics\['summary'\] is empty"),
        ({"qualty": []}, "unknown keys 'qualty'"),
        ({"mode": "spa"}, "generation lacks 'M'"),
        ({"quality": [{"rouge_l": 0.5}]}, r"metrics\['quality'\]\[0\] lacks 'name'"),
        ({"quality": [{"name": "base", "rouge_l": 46.2}]}, r"\['rouge_l'\] is 46\.2, expected a number from 0 to 1"),
        ({"quality": [{"name": "base", "rouge_l_interval": [0.5, 0.4]}]}, r"expected \[low, high\]"),
        ({"examples": [{"prompt": "p", "generation": {}}]}, r"metrics\['examples'\]\[0\]\['generation'\]: .*lacks"),
        ({"speed": [{"schedule": "x", "rtt_ms": 0, "tokens_per_s": 1}] * 2}, r"\('x', None, None, 0\) twice"),
        ({"gate_curve": [{"threshold": 0, "M": 1}]}, "mixes qualities"),
        ({"gate_curve": [{"threshold": 0, "M": 1, "rouge_l": 0.1, "nats_per_token": 1}]}, "mixes qualities"),
        ({"egress": {"prompt": {"count": 1}}}, r"metrics\['egress'\]\['prompt'\] lacks 'bytes'"),
        ({"training": [{"name": "x", "points": []}]}, "points'] is empty"),
        ({"training": [{"name": "x", "points": [[0, float("nan")]]}]}, r"\['points'\]\[0\]\[1\] is nan"),
        ({"notes": {"speeed": ["x"]}}, "expected one of 'story', 'quality'"),
    ],
)
def test_names_the_place_that_does_not_fit(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        check_report_metrics(report_metrics() | changes)


def test_only_title_and_summary_are_needed_and_none_is_absent() -> None:
    report, _ = check_report_metrics({"title": "t", "summary": ["s"], "quality": None, "notes": None})
    assert report["summary"] == ["s"]
    with pytest.raises(InputError, match="metrics lacks 'summary'"):
        check_report_metrics({"title": "t"})

"""The adapter to Presidio, over a small fake of its published interface."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

import pytest

from cotune.errors import InputError
from cotune.sandwich.detectors.presidio import PresidioDetector


@dataclass
class Result:
    entity_type: str
    start: int
    end: int
    score: float


class FakeEngine:
    """`AnalyzerEngine`: says what it was asked for."""

    def __init__(self, results: list[Result]) -> None:
        self.results = results
        self.asked: dict[str, Any] = {}

    def analyze(self, *, text: str, language: str, entities: list[str] | None, score_threshold: float) -> list[Result]:
        self.asked = {"text": text, "language": language, "entities": entities, "score_threshold": score_threshold}
        return [result for result in self.results if result.score >= score_threshold]


def test_results_become_findings_with_our_kinds() -> None:
    text = "Ann Lee wrote from ann@x.org on 5 May, licence X1"
    engine = FakeEngine(
        [
            Result("PERSON", 0, 7, 0.85),
            Result("EMAIL_ADDRESS", 19, 28, 1.0),
            Result("DATE_TIME", 32, 37, 0.6),
            Result("US_DRIVER_LICENSE", 47, 49, 0.5),
            Result("PERSON", 8, 13, 0.1),
        ]
    )
    found = list(PresidioDetector(language="en", entities=("PERSON",), engine=engine).find(text))
    assert [(each.kind, each.identity) for each in found] == [
        ("PERSON", "ann lee"),
        ("EMAIL", "ann@x.org"),
        ("DATE", "5 may"),
        ("USDRIVERLICENSE", "x1"),
    ]
    assert engine.asked == {"text": text, "language": "en", "entities": ["PERSON"], "score_threshold": 0.4}


def test_a_missing_package_names_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "presidio_analyzer", None)
    with pytest.raises(InputError, match=r"cotune\[presidio\]"):
        PresidioDetector()


def test_a_threshold_that_cannot_be_is_refused() -> None:
    with pytest.raises(InputError, match="threshold is 2"):
        PresidioDetector(threshold=2, engine=FakeEngine([]))

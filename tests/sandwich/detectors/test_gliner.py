"""The adapter to GLiNER, over a small fake of its published interface that also forgets what is too long."""

from __future__ import annotations

import re
import sys
from typing import Any

import pytest

from cotune.errors import InputError
from cotune.sandwich.detectors.gliner import GlinerDetector


class FakeModel:
    """`GLiNER`: finds one name, in the first `max_words` words only."""

    def __init__(self, max_words: int) -> None:
        self.max_words = max_words
        self.asked: list[tuple[list[str], float]] = []

    def predict_entities(self, text: str, labels: list[str], threshold: float = 0.5) -> list[dict[str, Any]]:
        self.asked.append((labels, threshold))
        words = list(re.finditer(r"\S+", text))[: self.max_words]
        read = text[: words[-1].end()]
        return [
            {"start": m.start(), "end": m.end(), "text": m[0], "label": "date of birth", "score": 0.9}
            for m in re.finditer("Ann Lee", read)
        ]


def test_entities_become_findings() -> None:
    model = FakeModel(50)
    detector = GlinerDetector(labels=("date of birth",), threshold=0.3, loaded=model)
    found = list(detector.find("  for Ann Lee. "))
    assert [(each.start, each.end, each.kind, each.identity) for each in found] == [(6, 13, "DATEOFBIRTH", "ann lee")]
    assert model.asked == [(["date of birth"], 0.3)]


@pytest.mark.parametrize("place", [0, 9, 10, 19, 20, 47, 99])
def test_nothing_is_left_out_of_a_long_text(place: int) -> None:
    words = ["word"] * 100
    words[place] = "Ann Lee"
    text = " ".join(words)
    detector = GlinerDetector(window_words=12, overlap_words=3, loaded=FakeModel(12))
    assert {text[each.start : each.end] for each in detector.find(text)} == {"Ann Lee"}


def test_an_empty_text_asks_nothing() -> None:
    model = FakeModel(5)
    assert list(GlinerDetector(loaded=model).find(" \n")) == [] and model.asked == []


def test_a_missing_package_names_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gliner", None)
    with pytest.raises(InputError, match=r"cotune\[gliner\]"):
        GlinerDetector("some-model")
    with pytest.raises(InputError, match="needs a model"):
        GlinerDetector()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"threshold": -1.0}, "threshold is -1"),
        ({"overlap_words": 120}, "overlap_words is 120"),
        ({"labels": ()}, "labels is empty"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        GlinerDetector(loaded=FakeModel(5), **settings)

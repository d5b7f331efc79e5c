from __future__ import annotations

import dataclasses
from html.parser import HTMLParser

from evaluation.report_example import generation
from hypothesis import given, settings
from hypothesis import strategies as st

from cotune.evaluation.coloured_text import coloured_text, decision_bar, decisions, legend
from cotune.evaluation.generation_metrics import GenerationMetrics
from cotune.evaluation.markup import plain


class Spans(HTMLParser):
    """The class and the text of each token."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens: list[tuple[str, str]] = []
        self.tags: set[str] = set()

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        given_attributes = dict(attributes)
        if "title" in given_attributes:
            self.tokens.append((str(given_attributes["class"]), ""))

    def handle_data(self, data: str) -> None:
        css_class, text = self.tokens[-1]
        self.tokens[-1] = (css_class, text + data)


def read(metrics: GenerationMetrics) -> Spans:
    spans = Spans()
    spans.feed(coloured_text(metrics))
    spans.close()
    return spans


def test_three_classes() -> None:
    assert decisions(generation()) == ["cloud", "device", "agreed"]
    assert read(generation()).tokens == [("t-cloud", "Ring"), ("t-device", " Mirko"), ("t-agreed", "∅")]


def test_tooltip_names_the_decision_the_place_and_the_id() -> None:
    assert 'title="The device changed this token. Token 2, id 6."' in coloured_text(generation())


def test_legend_and_bar_tell_in_words() -> None:
    for name in ("Cloud alone", "Consulted, agreed", "Changed by the device"):
        assert name in legend()
    assert "3 tokens: 1 cloud alone (33 %), 1 consulted, agreed (33 %), 1 changed by the device" in decision_bar(
        generation()
    )


def test_nothing_generated() -> None:
    nothing = dataclasses.replace(
        generation(), num_tokens=0, token_ids=(), tokens=(), sources=(), consulted=(), text=""
    )
    assert "No token was generated." in decision_bar(nothing)
    assert read(nothing).tokens == []


@settings(max_examples=40)
@given(st.lists(st.text(min_size=1), min_size=1, max_size=8))
def test_whatever_the_tokens_they_are_shown_as_text(tokens: list[str]) -> None:
    num_tokens = len(tokens)
    metrics = dataclasses.replace(
        generation(),
        num_tokens=num_tokens,
        token_ids=tuple(range(num_tokens)),
        tokens=tuple(tokens),
        sources=("cloud",) * num_tokens,
        consulted=(True,) * num_tokens,
    )
    spans = read(metrics)
    assert spans.tokens == [("t-agreed", plain(token)) for token in tokens]
    assert spans.tags == {"p", "span"}

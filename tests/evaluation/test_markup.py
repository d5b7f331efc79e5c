from __future__ import annotations

from html.parser import HTMLParser

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cotune.evaluation.markup import Column, Html, card, count, escape, number, plain, share, size, table


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (None, "–"),  # noqa: RUF001
        (0.0, "0"),
        (0.4617, "0.462"),
        (-0.05, "-0.050"),
        (5.018, "5.02"),
        (9.996, "10.0"),
        (12.34, "12.3"),
        (1204.4, "1,204"),
        (0.00012, "1.20e-04"),
        (3e12, "3.00e+12"),
    ],
)
def test_numbers_have_three_digits(value: float | None, words: str) -> None:
    assert number(value) == words


@pytest.mark.parametrize(
    ("num_bytes", "words"),
    [(0, "0 B"), (812, "812 B"), (999.4, "999 B"), (999.7, "1.00 kB"), (1204, "1.20 kB"), (999_900, "1.00 MB")],
)
def test_sizes(num_bytes: float, words: str) -> None:
    assert size(num_bytes) == words


def test_counts_and_shares() -> None:
    assert count(12982304) == "12,982,304"
    assert [share(0.0), share(0.0123), share(0.42), share(1.0)] == ["0 %", "1.2 %", "42 %", "100 %"]
    assert count(None) == share(None) == size(None)


def test_plain_shows_what_would_act() -> None:
    assert plain("a\x00b\x1b[31m\u202ec\ud800\n\t") == "a\u2400b\u241b[31m\ufffdc\ufffd\n\t"


class Reader(HTMLParser):
    """Collects the text and the tags of a page."""

    def __init__(self) -> None:
        super().__init__()
        self.text = ""
        self.tags: list[str] = []

    def handle_data(self, data: str) -> None:
        self.text += data

    def handle_starttag(self, tag: str, attributes: object) -> None:
        self.tags.append(tag)


@given(st.text())
def test_a_browser_reads_exactly_the_plain_text(text: str) -> None:
    reader = Reader()
    reader.feed(f'<p title="{escape(text)}">{escape(text)}</p>')
    reader.close()
    assert reader.text == plain(text)
    assert reader.tags == ["p"]
    escape(text).encode("utf-8")


def test_table_says_what_heads_what() -> None:
    columns = [Column("Model", [Html("base")], is_number=False), Column("M", [Html("0.5")])]
    page = table("Quality <now>", columns)
    assert '<th scope="col">Model</th>' in page
    assert '<th scope="row">base</th>' in page
    assert '<td class="num">0.5</td>' in page
    assert "<caption>Quality &lt;now&gt;</caption>" in page


def test_card_leaves_out_an_absent_note() -> None:
    assert "note" not in card(Html("5"), "Rate")
    assert '<p class="note">at 50 ms</p>' in card(Html("5"), "Rate", "at 50 ms")

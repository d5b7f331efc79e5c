"""Web addresses and where they end."""

from __future__ import annotations

import pytest

from cotune.sandwich.detectors.url import UrlDetector


def found(text: str) -> list[str]:
    return [text[each.start : each.end] for each in UrlDetector().find(text)]


@pytest.mark.parametrize(
    ("text", "url"),
    [
        ("see https://x.example/a?b=c#d.", "https://x.example/a?b=c#d"),
        ("(https://x.example/a_(b))", "https://x.example/a_(b)"),
        ("[here](http://x.example/a)", "http://x.example/a"),
        ('<a href="ftp://u:p@x.example/">', "ftp://u:p@x.example/"),
        ("**https://x.example/**", "https://x.example/"),
        ("www.x.example/y, then", "www.x.example/y"),
        ("on wiki.acme.internal/plans now", "wiki.acme.internal/plans"),
        ("visit Acme.com!", "Acme.com"),
        ("https://пример.рф/путь", "https://пример.рф/путь"),
        ("postgres://app:secret@db:5432/main", "postgres://app:secret@db:5432/main"),
    ],
)
def test_finds_the_whole_address_without_the_sentence(text: str, url: str) -> None:
    assert found(text) == [url]


@pytest.mark.parametrize(
    "text", ["http://", "e.g. this", "file.py", "a.b.c", "3.14", "ann@acme.com", "://x", "Mr.Smith"]
)
def test_leaves_the_rest_alone(text: str) -> None:
    assert found(text) == []

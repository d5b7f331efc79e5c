"""Identifiers by the word before them, and bare ones."""

from __future__ import annotations

import pytest

from cotune.sandwich.detectors.identifier import IdentifierDetector


def found(text: str) -> set[str]:
    return {text[each.start : each.end] for each in IdentifierDetector().find(text)}


@pytest.mark.parametrize(
    ("text", "identifier"),
    [
        ("The appointment ID is 34567890 and", "34567890"),
        ("my user ID is A12.", "A12"),
        ("order #77-12", "77-12"),
        ("username: 'user4'", "user4"),
        ("It's 90123456.", "90123456"),
        ("code x97531 please", "x97531"),
        ("device 10000025", "10000025"),
    ],
)
def test_finds_identifiers(text: str, identifier: str) -> None:
    assert found(text) == {identifier}


@pytest.mark.parametrize(
    "text", ["in 2024", "my id is secret", "order is restored", "12,500,000", "B17 and F4", "a 5 b", "3.14159265"]
)
def test_leaves_the_rest_alone(text: str) -> None:
    assert found(text) == set()

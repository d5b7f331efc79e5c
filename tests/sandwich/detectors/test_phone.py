"""Telephone numbers by form and by context."""

from __future__ import annotations

import pytest

from cotune.sandwich.detectors.phone import PhoneDetector


def found(text: str) -> list[tuple[str, str]]:
    return [(text[each.start : each.end], each.identity) for each in PhoneDetector().find(text)]


@pytest.mark.parametrize(
    ("text", "number", "identity"),
    [
        ("+49 30 901820", "+49 30 901820", "+4930901820"),
        ("reach me: +1-415-555-2671.", "+1-415-555-2671", "+14155552671"),
        ("0049 30 901820", "0049 30 901820", "+4930901820"),
        ("+44 (0)20 7946 0958", "+44 (0)20 7946 0958", "+4402079460958"),
        ("(415) 555-2671", "(415) 555-2671", "4155552671"),
        ("at 415-555-2671 or so", "415-555-2671", "4155552671"),
        ("415.555.2671", "415.555.2671", "4155552671"),
        ("1 415 555 2671", "1 415 555 2671", "14155552671"),
        ("030 901820 99", "030 901820 99", "03090182099"),
        ("my phone number is 4155552671", "4155552671", "4155552671"),
        ("Tel.: 901820-99", "901820-99", "90182099"),
        ("WhatsApp me on 5551234", "5551234", "5551234"),
    ],
)
def test_finds_numbers(text: str, number: str, identity: str) -> None:
    assert found(text) == [(number, identity)]


@pytest.mark.parametrize(
    "text",
    [
        "4155552671",
        "on 2024-05-12",
        "01.02.2023",
        "from 1990-2000",
        "12,500,000 people",
        "order 20240512",
        "version 1.2.3",
        "call me at 5",
        "call me on 2024-05-12",
        "fax of 01.02.2023",
        "pi is 3.14159265",
        "x4155552671y",
        "page 12 of 345",
    ],
)
def test_leaves_other_numbers_alone(text: str) -> None:
    assert found(text) == []

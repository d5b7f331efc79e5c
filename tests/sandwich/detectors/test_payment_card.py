"""Payment cards: the check digit by hand, groups, and what stands beside them."""

from __future__ import annotations

import pytest

from cotune.sandwich.detectors.payment_card import PaymentCardDetector, passes_luhn


def found(text: str) -> list[tuple[str, str]]:
    return [(text[each.start : each.end], each.identity) for each in PaymentCardDetector().find(text)]


def test_check_digit_by_hand() -> None:
    # 7992739871 and its check digit 3: 1+(2*7=14->5)... the sum is 70.
    assert [digit for digit in "0123456789" if passes_luhn("7992739871" + digit)] == ["3"]


@pytest.mark.parametrize(
    ("text", "card"),
    [
        ("4111111111111111", "4111111111111111"),
        ("card 5500-0000-0000-0004.", "5500-0000-0000-0004"),
        ("3782 822463 10005", "3782 822463 10005"),
        ("4111 1111\n1111 1111", "4111 1111\n1111 1111"),
        ("4111 1111 1111 1111 12/27 123", "4111 1111 1111 1111"),
        ("Nr4111111111111111", "4111111111111111"),
    ],
)
def test_finds_cards_in_groups(text: str, card: str) -> None:
    assert found(text) == [(card, "".join(letter for letter in card if letter.isdigit()))]


@pytest.mark.parametrize(
    "text",
    [
        "4111111111111112",  # the check digit is wrong
        "0000000000000000",
        "1234567812345670",  # right check digit; no network begins with 1
        "411111111111",
        "41111111111111111111111",
        "4111.1111.1111.1111",
    ],
)
def test_leaves_other_numbers_alone(text: str) -> None:
    assert found(text) == []


def test_two_cards_in_a_row_are_two() -> None:
    assert [identity for _, identity in found("4111111111111111 5500000000000004")] == [
        "4111111111111111",
        "5500000000000004",
    ]

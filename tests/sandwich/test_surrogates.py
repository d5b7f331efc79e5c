"""Made-up values: the same form, other content, and found again however they are grouped."""

from __future__ import annotations

import ipaddress
import random
import re

import pytest

from cotune.sandwich.detectors.iban import IbanDetector
from cotune.sandwich.detectors.payment_card import passes_luhn
from cotune.sandwich.placeholders import PlaceholderMap
from cotune.sandwich.surrogates import SURROGATES, letters_and_digits, surrogate_pattern

VALUES = {
    "EMAIL": "ann@x.org",
    "URL": "https://x.org/a",
    "IP": "10.0.0.7",
    "PHONE": "+49 (30) 901820-99",
    "CARD": "4111-1111 1111-1111",
    "IBAN": "GB82 WEST 1234 5698 7654 32",
    "PERSON": "Ann Lee",
}


@pytest.mark.parametrize("kind", VALUES)
def test_another_value_of_the_same_form(kind: str) -> None:
    made = {SURROGATES[kind](VALUES[kind], random.Random(seed)) for seed in range(20)}
    assert len(made) > 15
    for each in made:
        assert letters_and_digits(VALUES[kind]) not in letters_and_digits(each)
        assert re.fullmatch(surrogate_pattern(each), each)


def test_check_digits_are_right_and_groups_are_kept() -> None:
    for seed in range(20):
        card = SURROGATES["CARD"](VALUES["CARD"], random.Random(seed))
        assert passes_luhn(letters_and_digits(card)) and re.fullmatch(r"4\d{3}-\d{4} \d{4}-\d{4}", card)
        iban = SURROGATES["IBAN"](VALUES["IBAN"], random.Random(seed))
        assert len(list(IbanDetector().find(iban))) == 1 and re.fullmatch(
            r"GB\d\d [A-Z]{4} \d{4} \d{4} \d{4} \d\d", iban
        )
        phone = SURROGATES["PHONE"](VALUES["PHONE"], random.Random(seed))
        assert re.fullmatch(r"\+49 \(\d\d\) \d{6}-\d\d", phone)
        assert re.fullmatch(r"\(\d{3}\) 555-01\d\d", SURROGATES["PHONE"]("(415) 555-2671", random.Random(seed)))
        assert any(
            ipaddress.ip_address(SURROGATES["IP"](VALUES["IP"], random.Random(seed))) in ipaddress.ip_network(network)
            for network in ("192.0.2.0/24", "198.51.100.0/24", "203.0.113.0/24")
        )
        assert ipaddress.ip_address(SURROGATES["IP"]("fe80::1", random.Random(seed))) in ipaddress.ip_network(
            "2001:db8::/32"
        )


@pytest.mark.parametrize("kind", VALUES)
def test_copies_in_another_case_and_grouping_are_restored(kind: str) -> None:
    placeholders = PlaceholderMap(random.Random(1), style="surrogate")
    placeholders.avoid("some text")
    sent = placeholders.placeholder_for(kind, "x", VALUES[kind])
    assert not sent.startswith("<")
    assert placeholders.restore(f"See {sent.upper()}.") == f"See {VALUES[kind]}."
    if kind in ("CARD", "IBAN"):
        assert placeholders.restore(letters_and_digits(sent)) == VALUES[kind]
        digits = letters_and_digits(sent)
        assert placeholders.restore(f"{digits[:4]} - {digits[4:]}") == VALUES[kind]


def test_a_surrogate_that_stands_in_the_text_already_is_not_taken() -> None:
    first = PlaceholderMap(random.Random(5), style="surrogate").placeholder_for("PERSON", "a", "Ann Lee")
    careful = PlaceholderMap(random.Random(5), style="surrogate")
    careful.avoid(f"I met {first.upper()} yesterday")
    assert careful.placeholder_for("PERSON", "a", "Ann Lee") != first


def test_kinds_without_a_surrogate_and_glued_values_are_typed() -> None:
    placeholders = PlaceholderMap(random.Random(0), style="surrogate")
    assert placeholders.placeholder_for("KEY", "k", "sk-123").startswith("<KEY_")
    assert placeholders.placeholder_for("IP", "1", "10.0.0.7", is_glued=True).startswith("<IP_")
    assert not placeholders.placeholder_for("IP", "1", "10.0.0.7").startswith("<IP_")

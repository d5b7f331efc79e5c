"""Account numbers: published examples of the registry, check digits, lengths."""

from __future__ import annotations

import pytest

from cotune.sandwich.detectors.iban import LENGTHS, IbanDetector, passes_mod_97

# Examples of the IBAN registry.
EXAMPLES = [
    "AT611904300234573201",
    "BE68539007547034",
    "CH9300762011623852957",
    "DE89370400440532013000",
    "ES9121000418450200051332",
    "FR1420041010050500013M02606",
    "GB82WEST12345698765432",
    "IT60X0542811101000000123456",
    "MT84MALT011000012345MTLCAST001S",
    "NL91ABNA0417164300",
    "NO9386011117947",
    "SA0380000000608010167519",
]


def found(text: str) -> list[tuple[str, str]]:
    return [(text[each.start : each.end], each.identity) for each in IbanDetector().find(text)]


@pytest.mark.parametrize("iban", EXAMPLES)
def test_finds_published_examples_however_they_are_grouped(iban: str) -> None:
    assert len(iban) == LENGTHS[iban[:2]] and passes_mod_97(iban)
    groups = " ".join(iban[start : start + 4] for start in range(0, len(iban), 4))
    for written in (iban, groups, groups.lower(), groups.replace(" ", "\n", 2), groups.replace(" ", "-")):
        assert found(f"to {written}, please") == [(written, iban)]


@pytest.mark.parametrize("iban", EXAMPLES[:3])
def test_a_wrong_digit_is_no_account(iban: str) -> None:
    wrong = iban[:-1] + str((int(iban[-1]) + 1) % 10)
    assert found(wrong) == []


def test_a_known_country_has_its_length() -> None:
    # Right check digits for 21 characters, which no German account has.
    body = "37040044053201300"
    check = 98 - int("".join(str(int(letter, 36)) for letter in f"{body}DE00")) % 97
    assert passes_mod_97(f"DE{check:02d}{body}") and found(f"DE{check:02d}{body}") == []


def test_words_after_an_account_are_not_part_of_it() -> None:
    assert found("DE89 3704 0044 0532 0130 00 by Friday") == [("DE89 3704 0044 0532 0130 00", "DE89370400440532013000")]


def test_a_sentence_that_happens_to_pass_is_no_account() -> None:
    # Found by trying: 'is' is Iceland, and the 26 characters from it pass the check digits.
    sentence = next(
        text
        for number in range(10, 100)
        if passes_mod_97((text := f"is {number} apples and twentyfive fig").replace(" ", "").upper())
    )
    assert len(sentence.replace(" ", "")) == LENGTHS["IS"] and found(f"there {sentence}.") == []

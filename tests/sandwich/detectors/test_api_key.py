"""Secrets by prefix, by name and by entropy. None of these was ever valid."""

from __future__ import annotations

import pytest

from cotune.sandwich.detectors.api_key import ApiKeyDetector, entropy_bits


def found(text: str) -> set[str]:
    return {text[each.start : each.end] for each in ApiKeyDetector().find(text)}


# In two parts each, so that no scanner of this repository takes them for real.
PREFIXED = [
    ("AK" + "IA", "ABCDEFGHIJKLMNOP"),
    ("gh" + "p_", "a1B2c3D4e5F6g7H8i9J0k1L2m3N4o5P6q7R8"),
    ("glp" + "at-", "abcdefghij1234567890"),
    ("xox" + "b-", "123456789012-abcdefghij"),
    ("sk-" + "proj-", "aaaaaaaaaaaaaaaaaaaaaaaa"),
    ("sk_" + "live_", "aaaaaaaaaaaaaaaa"),
    ("AI" + "za", "a" * 35),
    ("h" + "f_", "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa"),
    ("ey" + "J", "hbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0NTY3ODkwIn0.abcdefghijkl"),
]


@pytest.mark.parametrize(("prefix", "rest"), PREFIXED)
def test_finds_known_prefixes(prefix: str, rest: str) -> None:
    assert prefix + rest in found(f"use {prefix}{rest}, please")


def test_a_private_key_is_found_whole_also_when_it_is_cut_off() -> None:
    block = "-----BEGIN RSA " + "PRIVATE KEY-----\nabc\n" + "def\n" * 20 + "-----END RSA " + "PRIVATE KEY-----"
    assert block in found(f"here:\n{block}\nthanks")
    assert block[:-40] in found(f"here:\n{block[:-40]}")


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("password=hunter", "hunter"),
        ('{"api_key": "abcd"}', "abcd"),
        ("my password is hunter22.", "hunter22"),
        ("Authorization: Bearer abc123def", "abc123def"),
        ("PIN: 4821", "4821"),
        ("my new password will be heron.", "heron"),
    ],
)
def test_finds_what_is_named(text: str, value: str) -> None:
    assert value in found(text)


def test_finds_what_looks_random() -> None:
    random_looking = "aB3xK9mQ2vT7pL5nR8wZ"
    assert found(f"see {random_looking} there") == {random_looking}
    assert found("3f2504e0-4f89-11d3-9a0c-0305e82c3301") == {"3f2504e0-4f89-11d3-9a0c-0305e82c3301"}


@pytest.mark.parametrize(
    "text",
    [
        "the secret: be kind",
        "internationalization-of-components",
        "a" * 64,
        "12345678901234567890123456789012",
        "token limit exceeded",
        "the password is required.",
        "the token is valid",
        "HelloWorldThisIsAFunctionName",
        "risk-averse",
    ],
)
def test_leaves_words_alone(text: str) -> None:
    assert found(text) == set()


def test_entropy_by_hand() -> None:
    assert entropy_bits("aaaa") == 0.0
    assert entropy_bits("abababab") == 1.0
    assert entropy_bits("aaab") == pytest.approx(0.8112781)

"""Made-up values of the same form, from ranges that belong to nobody where there are such.

    EMAIL    example.org and its siblings (RFC 2606)
    URL      the same
    IP       192.0.2.0/24, 198.51.100.0/24, 203.0.113.0/24 (RFC 5737); 2001:db8::/32 (RFC 3849)
    PHONE    the same grouping, country code and length, with 555-01xx in North America; elsewhere it may be somebody's
    IBAN     the same country and form with right check digits; it may be somebody's
    CARD     the same grouping and first digit, with a right check digit; it may be somebody's
    PERSON   a first name and a last name

What may be somebody's is to be read by a model and never to be used.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable

from cotune.sandwich.detectors.payment_card import passes_luhn

_FIRST = (
    "Ada Bela Cleo Dara Edin Faye Gwen Hana Ines Juno Kira Lina Mara Nora Odin Pavo Quin Rhea Sven Tara Ulla Vera Wren "
    "Xena Yara Zeno"
)
_LAST = (
    "Alder Birch Cedar Dogwood Elmer Ferns Gorse Hazel Ivers Jasmin Kapok Laurel Maple Neem Oakley Poplar Quince Rowan "
    "Sorrel Teak Umber Viburn Willow Yewtree Zelkov Ashby"
)
_FIRST_NAMES, _LAST_NAMES = _FIRST.split(), _LAST.split()
_DOMAINS = ("example.org", "example.net", "example.com")
_DOCUMENTATION = ("192.0.2", "198.51.100", "203.0.113")
_LETTERS = "abcdefghijkmnpqrstuvwxyz"


def letters_and_digits(text: str) -> str:
    """Without what models change when they copy: case, spaces and signs.

    Example:
        >>> letters_and_digits("+49 (30) 12-34 Ab")
        '49301234ab'
    """
    return "".join(letter for letter in text.casefold() if letter.isalnum())


def surrogate_pattern(surrogate: str) -> str:
    """A regular expression for a surrogate however it is grouped: up to three signs between two digits.

    Example:
        >>> bool(re.fullmatch(surrogate_pattern("202-555-0143"), "202) 555 0143"))
        True
    """
    kept = [letter for letter in surrogate if letter.isalnum()]
    if sum(letter.isdigit() for letter in kept) * 2 > len(kept):  # a number: its grouping is free
        signs = re.fullmatch(r"([\W_]*).*?([\W_]*)", surrogate, re.DOTALL)
        assert signs is not None
        first, last = (f"(?:{re.escape(each)})?" for each in signs.groups())
        return first + r"[\s().\-/]{0,3}".join(map(re.escape, kept)) + last
    return r"\s{1,2}".join(re.escape(word) for word in surrogate.split(" "))


def _email(_: str, generator: random.Random) -> str:
    name = f"{generator.choice(_FIRST_NAMES)}.{generator.choice(_LAST_NAMES)}{generator.randrange(10, 100)}"
    return f"{name.lower()}@{generator.choice(_DOMAINS)}"


def _url(value: str, generator: random.Random) -> str:
    path = "".join(generator.choice(_LETTERS) for _ in range(8))
    return f"https://{generator.choice(_DOMAINS)}/{path}"


def _ip(value: str, generator: random.Random) -> str:
    if ":" in value:
        return "2001:db8::" + ":".join(f"{generator.randrange(0x1000, 0x10000):x}" for _ in range(3))
    return f"{generator.choice(_DOCUMENTATION)}.{generator.randrange(1, 255)}"


def _phone(value: str, generator: random.Random) -> str:
    digits = re.findall(r"\d", value)
    kept = 3 if value.startswith(("+", "00")) else 1
    if len(digits) in (10, 11) and (len(digits) == 10 or digits[0] == "1") and not value.startswith("0"):
        tail = f"55501{generator.randrange(100):02d}"
        area = f"{generator.randrange(2, 10)}{generator.randrange(100):02d}"
        return _in_form(value, "1" * (len(digits) - 10) + area + tail)
    fresh = digits[:kept] + [str(generator.randrange(10)) for _ in digits[kept:]]
    return _in_form(value, "".join(fresh))


def _card(value: str, generator: random.Random) -> str:
    digits = re.findall(r"\d", value)
    body = digits[0] + "".join(str(generator.randrange(10)) for _ in digits[2:])
    check = next(str(check) for check in range(10) if passes_luhn(f"{body}{check}"))
    return _in_form(value, body + check)


def _iban(value: str, generator: random.Random) -> str:
    compact = "".join(letter for letter in value.upper() if letter.isalnum())
    body = "".join(
        str(generator.randrange(10)) if letter.isdigit() else generator.choice(_LETTERS).upper()
        for letter in compact[4:]
    )
    remainder = int("".join(str(int(letter, 36)) for letter in f"{body}{compact[:2]}00")) % 97
    return _in_form(value, f"{compact[:2]}{98 - remainder:02d}{body}")


def _person(value: str, generator: random.Random) -> str:
    return f"{generator.choice(_FIRST_NAMES)} {generator.choice(_LAST_NAMES)}"


def _in_form(value: str, characters: str) -> str:
    """The characters, with the signs of `value` between them."""
    fresh = iter(characters)
    return "".join(next(fresh) if letter.isalnum() else letter for letter in value if letter.isascii())


SURROGATES: dict[str, Callable[[str, random.Random], str]] = {
    "EMAIL": _email,
    "URL": _url,
    "IP": _ip,
    "PHONE": _phone,
    "CARD": _card,
    "IBAN": _iban,
    "PERSON": _person,
}
"""By kind: what makes a surrogate of a value. Kinds without one get a typed placeholder."""

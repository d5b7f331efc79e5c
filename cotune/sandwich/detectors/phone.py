"""Telephone numbers, by their form and by the words before them.

There is no check digit, so this is a rule of thumb: 7 to 15 digits (ITU-T E.164) in groups, which

- begin with + or 00, or
- begin with an area code in brackets, or
- are grouped 3-3-4 as in North America, with or without a 1 before, or
- begin with the 0 of a national number and have 9 to 12 digits in two groups or more, or
- stand within 24 characters after a word such as phone, mobile, call, fax, Tel. or WhatsApp.

Dates do not count. The package `phonenumbers` knows every country's plan, takes 20 MB on the disk, and must be told
which country to assume; it is not used.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from cotune.sandwich.finding import Finding

_RUN = re.compile(
    r"(?<![\w+])(?<!\d[.,/:-])(?:\+|\()?[ ]?\(?\d{1,15}\)?"
    r"(?:[ \t]?[-./()][ \t]?\(?\d{1,15}\)?|[ \t]\(?\d{1,15}\)?){0,8}(?!\w)"
)
_DIGITS = re.compile(r"\d+")
_MIN_DIGITS, _MAX_DIGITS = 7, 15
_WORDS = re.compile(
    r"\b(?:tel|telephone|telefon\w*|t[eé]l[eé]phone|phones?|cell|cellphone|mobile|mobil|movil|m[oó]vil|handy|call(?:s|ed|ing)?|"
    r"dial|fax|text|sms|ring|whatsapp|signal|hotline|contact|number|phone_?number|rufnummer|nummer)\b[^\d]{0,24}\Z",
    re.IGNORECASE,
)
_CONTEXT = 48
_DATE = re.compile(r"(?:\d{4}[-./ ]\d{1,2}[-./ ]\d{1,2}|\d{1,2}[-./ ]\d{1,2}[-./ ]\d{4})(?:[ ]\d{1,2})?")


class PhoneDetector:
    """Finds telephone numbers; kind PHONE, identity the digits, with + where it begins with + or 00.

    Example:
        >>> text = "Call (415) 555-2671 or +44 20 7946 0958 after 2024-05-12; order 20240512."
        >>> [f.identity for f in PhoneDetector().find(text)]
        ['4155552671', '+442079460958']
    """

    def find(self, text: str) -> Iterator[Finding]:
        """See `Detector`."""
        for run in _RUN.finditer(text):
            groups = [(each.start(), each.end()) for each in _DIGITS.finditer(text, run.start(), run.end())]
            found = _longest(text, run.start(), groups)
            if found is not None:
                start, end = run.start(), found
                if text[end : end + 1] == ")" and text.count("(", start, end) > text.count(")", start, end):
                    end += 1
                start += len(text[start:end]) - len(text[start:end].lstrip())
                yield Finding(start, end, "PHONE", _identity(text[start:end]))


def _longest(text: str, start: int, groups: list[tuple[int, int]]) -> int | None:
    """Where the longest number ends that begins with the first group."""
    for count in range(len(groups), 0, -1):
        end = groups[count - 1][1]
        if _looks_like_phone(text, start, end, [last - first for first, last in groups[:count]]):
            return end
    return None


def _looks_like_phone(text: str, start: int, end: int, sizes: list[int]) -> bool:
    written = text[start:end].strip()
    num_digits = sum(sizes)
    if not _MIN_DIGITS <= num_digits <= _MAX_DIGITS or _DATE.fullmatch(written.strip("()")):
        return False
    if written.startswith(("+", "00")):
        return True
    if written.startswith("(") and ")" in written:
        return True
    if sizes in ([3, 3, 4], [1, 3, 3, 4]) and (len(sizes) == 3 or written[0] == "1"):
        return True
    if written.startswith("0") and 9 <= num_digits <= 12 and len(sizes) >= 2:
        return True
    return _WORDS.search(text[max(0, start - _CONTEXT) : start]) is not None


def _identity(written: str) -> str:
    digits = "".join(_DIGITS.findall(written))
    if written.startswith("00"):
        return "+" + digits[2:]
    return "+" + digits if written.startswith("+") else digits

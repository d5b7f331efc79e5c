"""Payment cards: 13 to 19 digits, in groups or not, with the check digit of ISO/IEC 7812 (Luhn)."""

from __future__ import annotations

import re
from collections.abc import Iterator

from cotune.sandwich.finding import Finding

_GROUPS = re.compile(r"(?<![\d])\d{1,19}(?:[ \t\n-]{1,2}\d{1,19}){0,23}(?!\d)")
_DIGITS = re.compile(r"\d+")
_MIN_DIGITS, _MAX_DIGITS = 13, 19
_MAX_GROUPS = 10


def passes_luhn(digits: str) -> bool:
    """Whether the last digit is the check digit of the others: every second digit from the right counts twice.

    Example:
        >>> passes_luhn("4111111111111111"), passes_luhn("4111111111111112")
        (True, False)
    """
    total = 0
    for index, digit in enumerate(reversed(digits)):
        value = int(digit) * (1 + index % 2)
        total += value - 9 if value > 9 else value
    return total % 10 == 0


class PaymentCardDetector:
    """Finds card numbers that begin with 2 to 6 (the payment networks); kind CARD, identity the digits.

    A card may stand among other groups of digits, such as its date: the longest run of whole groups that passes counts.

    Example:
        >>> [f.identity for f in PaymentCardDetector().find("card 4111 1111 1111 1111, code 123")]
        ['4111111111111111']
    """

    def find(self, text: str) -> Iterator[Finding]:
        """See `Detector`."""
        for run in _GROUPS.finditer(text):
            groups = [(each.start(), each.end()) for each in _DIGITS.finditer(text, run.start(), run.end())]
            first = 0
            while first < len(groups):
                last = _last_group(text, groups, first)
                if last is None:
                    first += 1
                    continue
                start, end = groups[first][0], groups[last][1]
                yield Finding(start, end, "CARD", "".join(_DIGITS.findall(text[start:end])))
                first = last + 1


def _last_group(text: str, groups: list[tuple[int, int]], first: int) -> int | None:
    """The last group of the longest card that begins with this one."""
    digits, found = "", None
    for last in range(first, min(first + _MAX_GROUPS, len(groups))):
        digits += text[slice(*groups[last])]
        if len(digits) > _MAX_DIGITS:
            break
        if len(digits) >= _MIN_DIGITS and digits[0] in "23456" and len(set(digits)) > 1 and passes_luhn(digits):
            found = last
    return found

"""International bank account numbers, with the check digits of ISO 7064 (mod 97-10) and each country's length."""

from __future__ import annotations

import re
from collections.abc import Iterator

from cotune.sandwich.finding import Finding

# The IBAN registry of SWIFT (ISO 13616): characters in all.
_REGISTRY = (
    "AD:24 AE:23 AL:28 AT:20 AZ:28 BA:20 BE:16 BG:22 BH:22 BI:27 BR:29 BY:28 CH:21 CR:22 CY:28 CZ:24 DE:22 DJ:27 "
    "DK:18 DO:28 EE:20 EG:29 ES:24 FI:18 FK:18 FO:18 FR:27 GB:22 GE:22 GI:23 GL:18 GR:27 GT:28 HN:28 HR:21 HU:28 "
    "IE:22 IL:23 IQ:23 IS:26 IT:27 JO:30 KW:30 KZ:20 LB:28 LC:32 LI:21 LT:20 LU:20 LV:21 LY:25 MC:27 MD:24 ME:22 "
    "MK:19 MN:20 MR:27 MT:31 MU:30 NI:28 NL:18 NO:15 OM:23 PK:24 PL:28 PS:29 PT:25 QA:29 RO:24 RS:22 RU:33 SA:24 "
    "SC:31 SD:18 SE:24 SI:19 SK:24 SM:27 SO:23 ST:25 SV:28 TL:23 TN:24 TR:26 UA:29 VA:22 VG:24 XK:20 YE:30"
)

LENGTHS = {pair[:2]: int(pair[3:]) for pair in _REGISTRY.split()}
_SHORTEST, _LONGEST = 15, 34
_MIN_DIGITS = 8
_START = re.compile(r"(?<![A-Za-z0-9])[A-Za-z]{2}[ -]?\d{2}(?=[ \t\n-]?[A-Za-z0-9])")
_NEXT = re.compile(r"[ \t\n-]?([A-Za-z0-9])")


def passes_mod_97(iban: str) -> bool:
    """Whether the two check digits fit; letters count from A = 10 to Z = 35.

    Example:
        >>> passes_mod_97("GB82WEST12345698765432"), passes_mod_97("GB83WEST12345698765432")
        (True, False)
    """
    return int("".join(str(int(letter, 36)) for letter in iban[4:] + iban[:4])) % 97 == 1


class IbanDetector:
    """Finds account numbers, in groups or not, in upper or lower case; kind IBAN, identity without spaces.

    A country that is not in the registry may have any length from 15 to 34 and must be in capitals. Sentences pass the
    check digits once in a hundred times, so at least 8 characters after the first four must be digits.

    Example:
        >>> [f.identity for f in IbanDetector().find("to GB82 WEST 1234 5698 7654 32 please")]
        ['GB82WEST12345698765432']
    """

    def find(self, text: str) -> Iterator[Finding]:
        """See `Detector`."""
        for opening in _START.finditer(text):
            if found := _read(text, opening.start()):
                yield found


def _read(text: str, start: int) -> Finding | None:
    characters, end = "", start
    longest: Finding | None = None
    while len(characters) < _LONGEST and (letter := _NEXT.match(text, end)):
        characters += letter[1].upper()
        end = letter.end()
        if len(characters) < _SHORTEST or text[end : end + 1].isalnum():
            continue
        wanted = LENGTHS.get(characters[:2])
        if wanted is None and not text[start : start + 2].isupper():
            continue
        num_digits = sum(character.isdigit() for character in characters[4:])
        if wanted in (None, len(characters)) and num_digits >= _MIN_DIGITS and passes_mod_97(characters):
            longest = Finding(start, end, "IBAN", characters)
    return longest

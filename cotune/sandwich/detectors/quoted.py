"""What stands in quotation marks: people quote what is to be taken as it is, names of accounts and passwords among it.

Not on by default: titles and words that are spoken about are quoted too.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from cotune.sandwich.finding import Finding

_PAIRS = (
    ('"', '"'),
    ("\u201c", "\u201d"),
    ("\u201e", "\u201c"),
    ("\u201e", "\u201d"),
    ("\u00ab", "\u00bb"),
    ("\u00bb", "\u00ab"),
    ("\u2018", "\u2019"),
)
_MAX_CHARS = 100
_QUOTED = re.compile(
    "|".join(f"{first}([^{first}{last}\n]{{1,{_MAX_CHARS}}}){last}" for first, last in _PAIRS)
    + f"|(?<!\\w)'([^'\n]{{1,{_MAX_CHARS}}})'(?!\\w)"
)
_BEFORE_FIELD, _AFTER_FIELD = re.compile(r"[{,]\s*\Z"), re.compile(r"[ \t]*:")
_FIELD_GAP = 8


class QuotedDetector:
    """Finds what is quoted, without the marks; kind QUOTED, identity in lower case.

    Example:
        >>> text = "Call it \\"my new account\\", don't forget: 'hush7'"
        >>> [text[f.start : f.end] for f in QuotedDetector().find(text)]
        ['my new account', 'hush7']
    """

    def find(self, text: str) -> Iterator[Finding]:
        """See `Detector`."""
        for quoted in _QUOTED.finditer(text):
            before = text[max(0, quoted.start() - _FIELD_GAP) : quoted.start()]
            if _BEFORE_FIELD.search(before) and _AFTER_FIELD.match(text, quoted.end()):
                continue  # the name of a field of JSON is no quotation
            number = quoted.lastindex or 0
            inside = quoted[number]
            start = quoted.start(number) + len(inside) - len(inside.lstrip())
            end = quoted.end(number) - (len(inside) - len(inside.rstrip()))
            if any(letter.isalnum() for letter in text[start:end]):
                yield Finding(start, end, "QUOTED", text[start:end].casefold())

"""E-mail addresses, also those written for people: `ann [at] example [dot] org`.

Each at-sign is looked at once, with at most 320 characters to either side (RFC 5321 allows 64 before it and 255 after
it), so the time grows with the text alone.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from cotune.sandwich.finding import Finding

_REACH = 320
_AT = re.compile(
    r"@|%40|&#64;|&#x40;|&commat;"
    r"|[ \t]?[\[({<][ \t]?(?:at|@|arobase|arroba)[ \t]?[\])}>][ \t]?"
    r"|[ \t]at[ \t]",
    re.IGNORECASE,
)
_DOT = r"(?:\.|[ \t]?[\[({<][ \t]?(?:dot|punkt|point|punto|\.)[ \t]?[\])}>][ \t]?|[ \t]dot[ \t])"
_LABEL = r"[^\W_](?:[\w-]{0,61}[^\W_])?"
_PLAIN_LOCAL = frozenset("_.+%&'~!#$*^|-")
_DOMAIN = re.compile(rf"(?:{_LABEL}{_DOT}){{1,8}}(?:xn--[a-z0-9-]{{2,59}}|[^\W\d_]{{2,63}})(?!\w)", re.IGNORECASE)
_DOMAIN_LITERAL = re.compile(r"\[(?:IPv6:)?[0-9a-f:.]{2,45}\]|localhost\b", re.IGNORECASE)
_DOT_BEFORE = re.compile(r"[ \t]?[\[({<][ \t]?(?:dot|punkt|point|punto|\.)[ \t]?[\])}>][ \t]?\Z", re.IGNORECASE)
_ANY_DOT = re.compile(_DOT, re.IGNORECASE)
_SPOKEN_DOMAIN = re.compile(rf"(?:{_LABEL}[ \t]dot[ \t]){{1,8}}[^\W\d_]{{2,63}}(?!\w)", re.IGNORECASE)


class EmailDetector:
    """Finds addresses; kind EMAIL, identity the address in lower case with plain signs.

    Example:
        >>> [f.identity for f in EmailDetector().find("Ann.Lee@Example.org or bob [at] example [dot] com")]
        ['ann.lee@example.org', 'bob@example.com']
    """

    def find(self, text: str) -> Iterator[Finding]:
        """See `Detector`."""
        for at in _AT.finditer(text):
            spoken = at[0].strip().lower() == "at"
            domain = _find_domain(text, at.end(), spoken)
            start = _local_start(text, at.start(), spoken)
            if domain is not None and start < at.start():
                yield Finding(start, domain, "EMAIL", _plain(text[start : at.start()], text[at.end() : domain]))


def _find_domain(text: str, start: int, spoken: bool) -> int | None:
    patterns = (_SPOKEN_DOMAIN,) if spoken else (_DOMAIN, _DOMAIN_LITERAL)
    for pattern in patterns:
        if found := pattern.match(text, start, start + _REACH):
            return found.end()
    return None


def _local_start(text: str, end: int, spoken: bool) -> int:
    """Where the part before the at-sign begins; `end` where there is none."""
    earliest = max(0, end - _REACH)
    if text[end - 1 : end] == '"':
        opening = text.rfind('"', earliest, end - 1)
        return opening if 0 <= opening < end - 2 and "\n" not in text[opening:end] else end
    start = end
    while start > earliest and (text[start - 1].isalnum() or text[start - 1] in _PLAIN_LOCAL):
        start -= 1
    while not spoken and start < end and (before := _DOT_BEFORE.search(text[earliest:start])):
        word = start - len(before[0])
        while word > earliest and (text[word - 1].isalnum() or text[word - 1] in _PLAIN_LOCAL):
            word -= 1
        if word == start - len(before[0]):
            break
        start = word
    while start < end and text[start] in ".'":
        start += 1
    return start


def _plain(local: str, domain: str) -> str:
    return f"{_ANY_DOT.sub('.', local)}@{_ANY_DOT.sub('.', domain)}".lower()

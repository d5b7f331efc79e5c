"""Web and other addresses with a scheme, with www., or with a well-known ending."""

from __future__ import annotations

import re
from collections.abc import Iterator

from cotune.sandwich.finding import Finding

_STOPS = r"\s<>\"`\\^{}|"
_WITH_SCHEME = re.compile(rf"(?<![A-Za-z0-9+.-])[A-Za-z][A-Za-z0-9+.-]{{1,31}}://[^{_STOPS}]+")
_WITH_WWW = re.compile(rf"(?<![\w.@-])www\d?\.[^{_STOPS}]+", re.IGNORECASE)
# What people most often leave bare, and the names of private networks. Others need a scheme.
_ENDINGS = (
    "com org net edu gov mil int io ai app dev co info biz me tv eu us uk ca au de fr es it nl be ch at se no dk fi pl "
    "cz pt ie gr ru ua tr il in cn jp kr tw hk sg br mx ar cl za nz local internal intranet corp lan home"
)
_BARE = re.compile(
    rf"(?<![\w.@/:-])(?:[^\W_](?:[\w-]{{0,61}}[^\W_])?\.){{1,8}}(?:{'|'.join(_ENDINGS.split())})\b"
    rf"(?![@\w-]|\.\w)(?::\d{{1,5}})?(?:[/?#][^{_STOPS}]*)?",
    re.IGNORECASE,
)
_CLOSING = {")": "(", "]": "["}


class UrlDetector:
    """Finds addresses; kind URL, identity as written. Signs that end a sentence stay outside.

    Example:
        >>> text = "See https://wiki.example.org/Ann_(person), or www.example.org."
        >>> [f.identity for f in UrlDetector().find(text)]
        ['https://wiki.example.org/Ann_(person)', 'www.example.org']
    """

    def find(self, text: str) -> Iterator[Finding]:
        """See `Detector`."""
        found = [match for pattern in (_WITH_SCHEME, _WITH_WWW, _BARE) for match in pattern.finditer(text)]
        places = {(match.start(), _without_sentence_end(match[0])) for match in found}
        for start, url in sorted(places):
            if not url.endswith("://") and len(url) >= len("a.io"):
                yield Finding(start, start + len(url), "URL", url)


def _without_sentence_end(url: str) -> str:
    end = len(url)
    counts = {sign: url.count(sign) for sign in "()[]"}
    while end:
        last = url[end - 1]
        if last in _CLOSING and counts[last] > counts[_CLOSING[last]]:
            counts[last] -= 1
        elif last not in ".,;:!?'*_~\u2019\u201d":
            break
        end -= 1
    return url[:end]

"""A text as detectors read it: one way to write a digit, a dash, a dot and a space, and nothing invisible.

People and copied documents write one address in many ways: full-width digits, a zero-width space in the middle, an
ideographic full stop, letters with separate accents, JSON escapes. `FoldedText` undoes these (Unicode's NFKC, UAX 15,
and what is said below) and remembers where each character came from, so that what is found in the folded text is cut
out of the text as it was.

    removed       format characters (Cf: zero-width, bidirectional, soft hyphen), variation selectors
    to 0..9       decimal digits of all scripts
    to -          dashes (Pd) and the minus sign
    to .          the dots of other scripts that stand in addresses: 。 · ‧ ꓸ ۔
    to a space    all spaces (Zs)
    \\u00e9        escapes of this form are read as their character

Letters that look alike in two scripts (Cyrillic а, Latin a) are not made one.
"""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

_DOTS = "\u3002\u00b7\u2027\ua4f8\u06d4"
_ESCAPE = re.compile(r"\\u([0-9a-fA-F]{4})")
_DEEP_ESCAPE = re.compile(r"\\+(?:u([0-9a-fA-F]{4})|([\"/bfnrt]))")
_ESCAPED_PAIR = re.compile(r"\\u([dD][89abAB][0-9a-fA-F]{2})\\u([dD][c-fC-F][0-9a-fA-F]{2})")
# Letters that folding leaves as they are, for speed, as far as no mark comes after them.
_SAME = r"\x00-\[\]-\x7f\u00c0-\u00f6\u00f8-\u00ff\u0391-\u03a9\u03b1-\u03c9\u0410-\u044f\u4e00-\u9fff\uac00-\ud7a3"
_PLAIN = re.compile(f"[{_SAME}]+(?![^{_SAME}])")
_INVISIBLE = re.compile(
    "[\u00ad\u034f\u0600-\u0605\u061c\u06dd\u070f\u0890\u0891\u08e2\u115f\u1160\u180e\u200b-\u200f\u202a-\u202e\u2060-\u206f"
    "\u3164\ufe00-\ufe0f\ufeff\uffa0\ufff9-\ufffb\U000110bd\U000110cd\U00013430-\U0001343f\U0001bca0-\U0001bca3"
    "\U0001d173-\U0001d17a\U000e0001-\U000e007f\\\\]"
)
_JSON_ESCAPES = {'"': '"', "\\": "\\", "/": "/", "b": "\b", "f": "\f", "n": "\n", "r": "\r", "t": "\t"}


Escapes = Literal["unicode", "json", "all"]


@dataclass(frozen=True)
class FoldedText:
    """A folded text and where it came from.

    Args:
        text: the folded text.
        starts, ends: for each of its characters, the piece of the original that it stands for.

    Example:
        >>> folded = FoldedText.of("tel: \uff11\uff12\u200b\uff13")
        >>> folded.text, folded.original_span(5, 8)
        ('tel: 123', (5, 9))
    """

    text: str
    starts: tuple[int, ...] | range
    ends: tuple[int, ...] | range

    @classmethod
    def of(cls, text: str, *, escapes: Escapes = "unicode", invisible: str = "") -> FoldedText:
        """Fold a text.

        Args:
            text: any text.
            escapes: which are read as their characters: of the form \\u00e9 alone; all of `json` strings; or `all` of
                them behind any number of backslashes, as in JSON inside of JSON.
            invisible: what takes the place of invisible characters.
        """
        if text.isascii() and "\\" not in text:
            return cls(text, range(len(text)), range(1, len(text) + 1))
        folded: list[str] = []
        starts: list[int] = []
        ends: list[int] = []
        position = 0
        while position < len(text):
            if plain := _PLAIN.match(text, position):
                folded.append(plain[0])
                starts.extend(range(position, plain.end()))
                ends.extend(range(position + 1, plain.end() + 1))
                position = plain.end()
                continue
            cluster, end = _cluster(text, position, escapes)
            written = _fold_cluster(cluster, invisible)
            folded.append(written)
            starts.extend([position] * len(written))
            ends.extend([end] * len(written))
            position = end
        return cls("".join(folded), tuple(starts), tuple(ends))

    def casefolded(self) -> FoldedText:
        """Without upper and lower case, by Unicode's full case folding: ß is ss."""
        if self.text.isascii():
            return FoldedText(self.text.lower(), self.starts, self.ends)
        parts = [letter.casefold() for letter in self.text]
        if all(len(part) == 1 for part in parts):
            return FoldedText("".join(parts), self.starts, self.ends)
        origins = [index for index, part in enumerate(parts) for _ in part]
        return FoldedText("".join(parts), tuple(self.starts[i] for i in origins), tuple(self.ends[i] for i in origins))

    def original_span(self, start: int, end: int) -> tuple[int, int]:
        """The piece of the original that text[start:end] stands for; start < end."""
        return self.starts[start], self.ends[end - 1]


def fold_views(text: str, *, is_json: bool = False) -> list[FoldedText]:
    """The foldings to look at: with invisible characters left out or as spaces, and with escapes read or not.

    A zero-width space stands inside an address to hide it, or between two words to part them; a backslash and n is the
    end of a line in pasted JSON and a piece of a path elsewhere. Nobody knows which.

    Example:
        >>> [view.text for view in fold_views("Ann\u200bLee")]
        ['AnnLee', 'Ann Lee']
    """
    first: Escapes = "json" if is_json else "unicode"
    ways = [first, "all"] if _DEEP_ESCAPE.search(text) else [first]
    views = [FoldedText.of(text, escapes=way) for way in ways]
    if _INVISIBLE.search(text):
        views += [FoldedText.of(text, escapes=way, invisible=" ") for way in ways]
    return [view for index, view in enumerate(views) if view.text not in [other.text for other in views[:index]]]


def _cluster(text: str, position: int, escapes: Escapes) -> tuple[str, int]:
    """A character with the marks after it, and where they end; an escape counts as its character."""
    cluster, end = _character(text, position, escapes)
    while end < len(text):
        letter, next_end = _character(text, end, escapes)
        if not _continues(letter):
            break
        cluster, end = cluster + letter, next_end
    return cluster, end


def _character(text: str, position: int, escapes: Escapes) -> tuple[str, int]:
    if text[position] == "\\":
        return _unescape(text, position, escapes)
    return text[position], position + 1


def _unescape(text: str, position: int, escapes: Escapes) -> tuple[str, int]:
    if escapes == "all" and (deep := _DEEP_ESCAPE.match(text, position)):
        return chr(int(deep[1], 16)) if deep[1] else _JSON_ESCAPES[deep[2]], deep.end()
    if pair := _ESCAPED_PAIR.match(text, position):
        high, low = (int(digits, 16) for digits in pair.groups())
        return chr(0x10000 + ((high - 0xD800) << 10) + (low - 0xDC00)), pair.end()
    if escape := _ESCAPE.match(text, position):
        return chr(int(escape[1], 16)), escape.end()
    if escapes == "json" and position + 1 < len(text) and text[position + 1] in _JSON_ESCAPES:
        return _JSON_ESCAPES[text[position + 1]], position + 2
    return text[position], position + 1


@lru_cache(maxsize=4096)
def _continues(letter: str) -> bool:
    """Whether it is written together with the character before it: marks, vowels and finals of Hangul."""
    return unicodedata.combining(letter) != 0 or "\u1160" <= letter <= "\u11ff"


@lru_cache(maxsize=4096)
def _fold_cluster(cluster: str, invisible: str) -> str:
    return "".join(_fold_letter(letter, invisible) for letter in unicodedata.normalize("NFKC", cluster))


def _fold_letter(letter: str, invisible: str) -> str:
    category = unicodedata.category(letter)
    if category == "Nd":
        return str(unicodedata.decimal(letter))
    if category == "Pd" or letter == "\u2212":
        return "-"
    if letter in _DOTS:
        return "."
    if category == "Zs":
        return " "
    if category == "Cf" or "\ufe00" <= letter <= "\ufe0f" or letter in "\u034f\u115f\u1160\u3164":
        return invisible
    return letter

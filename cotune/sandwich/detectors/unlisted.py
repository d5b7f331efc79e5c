"""Strict: every word is private that is not on a list of common ones. Not on by default; needs a list.

The other detectors know what is private and miss the rest; this one knows what is not. Looked at are the pieces between
spaces, brackets, quotes, commas and signs of equality, without the marks around them: a piece may stay if all its words
are on the list, whatever their case, and is replaced as a whole otherwise (`p@ssw0rd`, `12/04/2023`). What is private
and made of common words alone stays: a name such as Will, a title. So the dictionary and `quoted` belong beside it.

A list is learnt from texts of others than the user (`learn_common_words`): a word that many of them use tells of none.
Only words in small letters count there, so that names do not get on it, and numbers of up to two digits.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator

from cotune.errors import InputError
from cotune.sandwich.finding import Finding
from cotune.sandwich.folding import FoldedText

_PIECE = re.compile(r"[^\s()\[\]{}<>\"=,;]+")
_WORD = re.compile(r"[^\W_]+")
_ENDINGS = ("'s", "\u2019s")
_COMMON = re.compile(r"(?<![\w.@/-])(?:[^\W\d_]+|\d{1,2})(?![\w@/-])")
MAX_WORDS = 200_000


class UnlistedDetector:
    """Finds the pieces of a text with a word that is not on the list; kind WORD, identity in lower case.

    Args:
        words: that may stay.

    Raises:
        InputError: no word, too many, or something that is no word.

    Example:
        >>> text = "Book a room, Zoe's: p@ssw0rd, 12 nights"
        >>> [text[f.start : f.end] for f in UnlistedDetector(["book", "a", "room", "nights", "12"]).find(text)]
        ['Zoe', 'p@ssw0rd']
    """

    def __init__(self, words: Iterable[str]) -> None:
        self._words = frozenset(FoldedText.of(word).casefolded().text.strip() for word in words)
        if not 1 <= len(self._words) <= MAX_WORDS:
            raise InputError(f"the allow list has {len(self._words)} words, expected 1 to {MAX_WORDS:,}")
        for word in self._words:
            if not _WORD.fullmatch(word):
                raise InputError("the allow list holds something that is no word, expected letters or digits alone")

    def find(self, text: str) -> Iterator[Finding]:
        """See `Detector`."""
        for piece in _PIECE.finditer(text):
            words = list(_WORD.finditer(piece[0]))
            if not words:
                continue
            start, end = piece.start() + words[0].start(), piece.start() + words[-1].end()
            if text[start:end].endswith(_ENDINGS):
                end -= len(_ENDINGS[0])
            if any(word.casefold() not in self._words for word in _WORD.findall(text[start:end])):
                yield Finding(start, end, "WORD", text[start:end].casefold())


def learn_common_words(texts: Iterable[str], *, min_texts: int) -> list[str]:
    """Words that at least `min_texts` of the texts use, in small letters; in order of the alphabet.

    Args:
        texts: each of another person, or about another thing; nothing of the user's own.
        min_texts: the larger, the shorter the list.

    Raises:
        InputError: `min_texts` is less than 2: a word of one text may be about that one.

    Example:
        >>> learn_common_words(["Ann has 2 cats", "2 cats and Ann", "cats, rats"], min_texts=2)
        ['2', 'cats']
    """
    if min_texts < 2:
        raise InputError(f"min_texts is {min_texts}, expected at least 2: a word of one text may be about that one")
    counts: Counter[str] = Counter()
    for text in texts:
        found = _COMMON.findall(FoldedText.of(text).text)
        counts.update({word for word in found if word.isdigit() or word == word.casefold()})
    return sorted(word for word, number in counts.items() if number >= min_texts)

"""A user's own words: names, employer, projects; whatever no rule can know.

A dictionary file has one entry a line: a kind, a colon, and the ways to write it, parted by bars. A line without a kind
is a TERM; empty lines and lines that begin with # do not count.

    PERSON: Ann Lee | Ann | A. Lee
    PROJECT: Blue Heron
    Zürich office

How words are matched:

- case: Unicode's full case folding (STRASSE finds Straße); accents count (Muller does not find Müller: add it);
- boundaries: whole words only. A letter beside a digit is a boundary, and so is _: `blue_heron2` holds Blue Heron,
  `blueheron` does not. Scripts written without spaces (Han, Kana, Thai, Lao, Khmer, Myanmar) match anywhere;
- between the words of an entry: up to four spaces, line ends, dots, dashes, underscores, slashes or apostrophes;
- endings: 's and ' stay outside the finding, as do the endings of `endings` (s, es, n, en: plural and genitive);
  nothing else is inflected. Add other forms with bars: all of one line are the same thing to the cloud.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise

from cotune.errors import InputError
from cotune.sandwich.finding import KIND_PATTERN, Finding
from cotune.sandwich.folding import FoldedText

_WORD = re.compile(r"[^\W\d_]+|\d+")
_SOFT = frozenset(" \t\r\n_-./'\u2019")
_MAX_GAP = 4
_UNSPACED = re.compile(
    "[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0002fa1f]"
)
_MAX_ENTRIES = 100_000
_MAX_FORM_CHARS = 200


@dataclass(frozen=True)
class DictionaryEntry:
    """One private thing and the ways to write it.

    Args:
        forms: the first is what it is called.
        kind: 2 to 16 of the letters A to Z.

    Raises:
        InputError: no form, one without a letter or digit, one that is too long, or a kind written otherwise.

    Example:
        >>> DictionaryEntry(("Ann Lee", "Ann"), "PERSON").kind
        'PERSON'
    """

    forms: tuple[str, ...] = field(repr=False)
    kind: str = "TERM"

    def __post_init__(self) -> None:
        if not KIND_PATTERN.fullmatch(self.kind):
            raise InputError(f"the kind of a dictionary entry is {self.kind!r}, expected 2 to 16 of the letters A to Z")
        if not self.forms:
            raise InputError(f"an entry of kind {self.kind} has no form; write at least one word for it")
        for form in self.forms:
            if len(form) > _MAX_FORM_CHARS or not any(letter.isalnum() for letter in form):
                raise InputError(
                    f"a form of an entry of kind {self.kind} has {len(form)} characters, "
                    f"expected 1 to {_MAX_FORM_CHARS} with a letter or a digit"
                )


def parse_dictionary(text: str) -> list[DictionaryEntry]:
    """The entries of a dictionary file.

    Raises:
        InputError: a line that is no entry (names the line, not what it says), or too many.

    Example:
        >>> [entry.kind for entry in parse_dictionary("PERSON: Ann Lee | Ann\\n# a remark\\nZürich office")]
        ['PERSON', 'TERM']
    """
    entries = []
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        kind, colon, rest = line.partition(":")
        if not (colon and KIND_PATTERN.fullmatch(kind.strip())):
            kind, rest = "TERM", line
        try:
            entries.append(DictionaryEntry(tuple(form.strip() for form in rest.split("|")), kind.strip()))
        except InputError as error:
            raise InputError(f"line {number} of the dictionary: {error}") from None
    if len(entries) > _MAX_ENTRIES:
        raise InputError(f"the dictionary has {len(entries)} entries, expected at most {_MAX_ENTRIES}; split it")
    return entries


@dataclass(frozen=True)
class _Form:
    words: tuple[str, ...]
    gaps: tuple[str, ...]
    kind: str
    identity: str


class DictionaryDetector:
    """Finds the entries of a dictionary; identity the first form of the entry.

    The time grows with the text and hardly with the dictionary: forms are looked up by their first word.

    Args:
        entries: what is private.
        endings: what may follow the last word of a form without belonging to it.

    Example:
        >>> detector = DictionaryDetector([DictionaryEntry(("Blue Heron",), "PROJECT")])
        >>> text = "BLUE  HERON's plan; blue_herons; bluebird"
        >>> [text[f.start : f.end] for f in detector.find(text)]
        ['BLUE  HERON', 'blue_heron']
    """

    def __init__(
        self, entries: Iterable[DictionaryEntry], *, endings: tuple[str, ...] = ("s", "es", "n", "en")
    ) -> None:
        self._endings = tuple(ending.casefold() for ending in endings)
        self._by_first_word: dict[str, list[_Form]] = {}
        self._anywhere: list[tuple[str, str, str]] = []
        for entry in entries:
            identity = _case_folded(entry.forms[0])
            for form in entry.forms:
                self._add(_case_folded(form), entry.kind, identity)

    def _add(self, form: str, kind: str, identity: str) -> None:
        if _UNSPACED.search(form):
            self._anywhere.append((form, kind, identity))
            return
        matches = list(_WORD.finditer(form))
        if not matches:
            raise InputError(f"a form of an entry of kind {kind} has no letter or digit once folded; leave it out")
        gaps = tuple(form[one.end() : two.start()] for one, two in pairwise(matches))
        words = tuple(match[0] for match in matches)
        self._by_first_word.setdefault(words[0], []).append(_Form(words, gaps, kind, identity))

    def find(self, text: str) -> Iterator[Finding]:
        """See `Detector`."""
        folded = FoldedText(text, range(len(text)), range(1, len(text) + 1)).casefolded()
        for start, end, kind, identity in self._places(folded.text):
            yield Finding(*folded.original_span(start, end), kind, identity)

    def _places(self, text: str) -> Iterator[tuple[int, int, str, str]]:
        words = list(_WORD.finditer(text))
        for index, word in enumerate(words):
            for stem in self._stems(word[0]):
                for form in self._by_first_word.get(stem, ()):
                    end = self._match(text, words, index, form)
                    if end is not None:
                        yield word.start(), end, form.kind, form.identity
        for form_text, kind, identity in self._anywhere:
            position = text.find(form_text)
            while position >= 0:
                yield position, position + len(form_text), kind, identity
                position = text.find(form_text, position + len(form_text))

    def _stems(self, word: str) -> list[str]:
        endings = [ending for ending in self._endings if word.endswith(ending) and len(word) > len(ending)]
        return list(dict.fromkeys([word, *(word[: -len(ending)] for ending in endings)]))

    def _match(self, text: str, words: list[re.Match[str]], index: int, form: _Form) -> int | None:
        """Where the form ends that begins with this word; None where it does not stand here."""
        if index + len(form.words) > len(words):
            return None
        for offset, wanted in enumerate(form.words[:-1]):
            here, after = words[index + offset], words[index + offset + 1]
            gap, wanted_gap = text[here.end() : after.start()], form.gaps[offset]
            if here[0] != wanted or not (gap == wanted_gap or (_is_soft(gap) and _is_soft(wanted_gap))):
                return None
        last = words[index + len(form.words) - 1]
        wanted = form.words[-1]
        return last.start() + len(wanted) if wanted in self._stems(last[0]) else None


def _is_soft(gap: str) -> bool:
    return len(gap) <= _MAX_GAP and _SOFT.issuperset(gap)


def _case_folded(form: str) -> str:
    return FoldedText.of(form).casefolded().text.strip()

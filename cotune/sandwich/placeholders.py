"""What stands for private values in one request, and how it is found again in an answer.

A placeholder is `<KIND_NUMBER>`, such as `<EMAIL_4821>`, or `<KIND_NUMBER_SPELLING>` for a second way to write the same
value. Numbers come from a generator and are used for one value in one request only, so nothing can be looked up from
them, and two requests have none in common. In the style `surrogate` a made-up value of the same form stands there
instead (`cotune.sandwich.surrogates`).

Models change what they copy. All of these are found:

    <email_4821>  <EMAIL 4821>  <EMAIL-4821>  < EMAIL_4821 >  <EMAIL_4821  EMAIL_4821  Email 4821  [EMAIL_4821]
    **<EMAIL_4821>**  \\<EMAIL\\_4821\\>  &lt;EMAIL_4821&gt;  %3CEMAIL_4821%3E  \\u003cEMAIL_4821\\u003e  <EMAIL_4821>s

A placeholder in angle brackets whose number is not of this request is marked and never guessed at.
"""

from __future__ import annotations

import html
import json
import random
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NoReturn
from urllib.parse import quote

from cotune.errors import InputError
from cotune.sandwich.finding import KIND_PATTERN
from cotune.sandwich.folding import FoldedText
from cotune.sandwich.json_text import escape_json
from cotune.sandwich.surrogates import SURROGATES, letters_and_digits, surrogate_pattern

Style = Literal["typed", "surrogate"]

LITERAL = "TEXT"
"""The kind of texts that were there before and look like placeholders."""
UNKNOWN = "[unknown placeholder {}]"
"""What takes the place of a placeholder that no value is known for."""

_KINDS = ("EMAIL", "PHONE", "IBAN", "CARD", "IP", "URL", "KEY", "PERSON", "ORGANIZATION", "LOCATION", "TERM", LITERAL)
_NUMBER = re.compile(r"(?<!\d)\d{4,6}(?!\d)")
_TAKEN_SHARE = 0.5  # of the numbers of one length, before longer ones are drawn
_MAX_NUMBER = 999_999
_OPENINGS = ("<", "\\<", "\\\\<", "&lt;", "&#60;", "%3c", "\\u003c", "\\\\u003c", "\uff1c", "\u2039", "\u00ab")
_CLOSINGS = (">", "\\>", "\\\\>", "&gt;", "&#62;", "%3e", "\\u003e", "\\\\u003e", "\uff1e", "\u203a", "\u00bb")
_ANY_OPENING = "|".join(re.escape(each) for each in sorted(_OPENINGS, key=len, reverse=True))
_ANY_CLOSING = "|".join(re.escape(each) for each in sorted(_CLOSINGS, key=len, reverse=True))
_TAIL = re.compile(
    r"[\\_ \u00a0#:.\-]{0,3}\d{0,6}(?:\\{0,2}[_.\-]\d{0,3})?\s?[\\u003e&gt;#62%\uff1e\u203a\u00bb]{0,8}", re.IGNORECASE
)
_MAX_TYPED = 64


@dataclass(frozen=True, repr=False)
class Entry:
    """A value and what stands for it. Neither `repr` nor a log shows the value.

    Args:
        placeholder: what is sent.
        kind, identity: of the finding.
        value: as it is put into plain text.
        json_text: as it stood between the quotes of a JSON string, where it did.
        is_number: it was a number of a JSON document, and becomes one again.
    """

    placeholder: str
    kind: str
    identity: str
    value: str
    json_text: str | None = None
    is_number: bool = False

    def __repr__(self) -> str:
        return f"Entry({self.placeholder})"


class PlaceholderMap:
    """The map of one request, or of one conversation: placeholders to values and back. It stays in memory.

    Args:
        generator: draws numbers and surrogates.
        taken: numbers of other requests; what is drawn here is added.
        style: `typed` or `surrogate`.

    Raises:
        InputError: an unknown style.

    Example:
        >>> placeholders = PlaceholderMap(random.Random(0))
        >>> sent = placeholders.placeholder_for("EMAIL", "ann@x.org", "Ann@x.org")
        >>> sent, placeholders.restore(f"I wrote to {sent.lower()}."), placeholders
        ('<EMAIL_7311>', 'I wrote to Ann@x.org.', PlaceholderMap(EMAIL: 1))
    """

    def __init__(self, generator: random.Random, *, taken: set[int] | None = None, style: Style = "typed") -> None:
        if style not in ("typed", "surrogate"):
            raise InputError(f"style is {style!r}, expected typed or surrogate")
        self._generator = generator
        self._taken = taken if taken is not None else set()
        self._style = style
        self._seen_numbers: set[str] = set()
        self._seen_text = ""
        self._numbers: dict[tuple[str, str], int] = {}
        self._entries: dict[tuple[int, int], Entry] = {}
        self._by_writing: dict[tuple[int, str, str | None, bool, bool], Entry] = {}
        self._surrogates: dict[str, Entry] = {}
        self._kinds = {*_KINDS}
        self._patterns: dict[bool, re.Pattern[str]] = {}

    @property
    def entries(self) -> list[Entry]:
        """All of them, in the order in which they came."""
        return [*self._entries.values()]

    @property
    def longest(self) -> int:
        """No placeholder, however it is changed, is longer; characters."""
        return max([_MAX_TYPED, *(4 * len(skeleton) + 8 for skeleton in self._surrogates)])

    def avoid(self, text: str) -> None:
        """Draw nothing that stands in this text already."""
        self._seen_numbers.update(_NUMBER.findall(text))
        if self._style == "surrogate":
            self._seen_text += " " + letters_and_digits(text)

    def expect_kinds(self, kinds: set[str]) -> None:
        """From now on, unknown placeholders of these kinds are marked too."""
        if not kinds <= self._kinds:
            self._kinds |= kinds
            self._patterns.clear()

    def placeholder_for(
        self,
        kind: str,
        identity: str,
        value: str,
        *,
        json_text: str | None = None,
        is_number: bool = False,
        is_glued: bool = False,
    ) -> str:
        """What stands for a value: the same for the same value, another spelling of the same number for another way to
        write the same thing.

        Args:
            kind, identity: of the finding.
            value, json_text, is_number: see `Entry`.
            is_glued: a letter or digit stands right beside it, where a surrogate could not be told from its neighbours.
        """
        self.expect_kinds({kind})
        number = self._numbers.get((kind, identity))
        if number is None:
            number = self._numbers[kind, identity] = self._draw()
        writing = (number, value, json_text, is_number, is_glued and self._style == "surrogate")
        entry = self._by_writing.get(writing)
        if entry is None:
            spelling = 1 + sum(key[0] == number for key in self._entries)
            surrogate = None if is_glued else self._surrogate(kind, value)
            placeholder = surrogate or _typed(kind, number, spelling)
            entry = Entry(placeholder, kind, identity, value, json_text, is_number)
            self._entries[number, spelling] = self._by_writing[writing] = entry
            if not placeholder.startswith("<"):
                self._surrogates[letters_and_digits(placeholder)] = entry
                self._patterns.clear()
        return entry.placeholder

    def _draw(self) -> int:
        for low in (1_000, 10_000, 100_000):
            if len(self._taken) < _TAKEN_SHARE * 9 * low or low == 100_000:
                break
        for _ in range(10_000):
            number = self._generator.randrange(low, 10 * low)
            if number not in self._taken and str(number) not in self._seen_numbers:
                self._taken.add(number)
                return number
        raise InputError(
            f"{len(self._taken)} placeholders were given out, which leaves hardly any; make another Redactor"
        )

    def _surrogate(self, kind: str, value: str) -> str | None:
        if self._style == "typed" or kind not in SURROGATES:
            return None
        plain = FoldedText.of(value).text
        for _ in range(100):
            made = SURROGATES[kind](plain, self._generator)
            skeleton = letters_and_digits(made)
            clashes = any(skeleton in other or other in skeleton for other in self._surrogates)
            if not clashes and skeleton not in self._seen_text and skeleton != letters_and_digits(value):
                return made
        return None

    def restore(self, text: str, *, is_json: bool = False) -> str:
        """Put values back.

        Args:
            text: an answer, whole.
            is_json: it is a JSON document: values are escaped for its strings, and numbers become numbers.
        """
        return self._pattern(is_json).sub(lambda match: self.replacement(match, is_json), text)

    def number_for(self, text: str) -> int | float | None:
        """The number of a JSON value whose placeholder is all of this text; None where it is anything else."""
        match = self._pattern(True).fullmatch(f'"{text}"')
        written = '"' if match is None else self.replacement(match, True)
        if written.startswith('"'):
            return None
        number = json.loads(written)
        assert isinstance(number, int | float)
        return number

    def search(self, text: str, start: int, *, is_json: bool = False) -> re.Match[str] | None:
        """The next thing that `restore` would look at, from `start` on."""
        return self._pattern(is_json).search(text, start)

    def touched(self, text: str) -> Iterator[tuple[int, int]]:
        """The places that `restore` would change in a text that has not been redacted."""
        for match in self._pattern(False).finditer(text):
            if self.replacement(match, False) != match[0]:
                yield match.span()

    def replacement(self, match: re.Match[str], is_json: bool) -> str:
        """What `restore` writes instead of a match."""
        if match["surrogate"]:
            entry = self._surrogates[letters_and_digits(match["surrogate"])]
            return self._written(entry, is_json)
        opening, closing = match["open"] or "", (match["close"] or "").lstrip()
        before = ""
        if opening.startswith("\\") and opening.endswith("<") and closing == ">":
            before, opening = opening[:-1], "<"  # the backslash is the text's own
        spelling = int(match["spelling"]) if match["spelling"] else 1
        entry_or_none = self._entries.get((int(match["number"]), spelling))
        rest = ""
        if entry_or_none is None and match["spelling"] and not closing:
            entry_or_none = self._entries.get((int(match["number"]), 1))  # such as EMAIL_4821-5
            rest = match["tail"]
        if entry_or_none is None or entry_or_none.kind != match["kind"].upper():
            return UNKNOWN.format(match[0]) if opening and closing else match[0]
        quotes = (match["quote"], match["unquote"]) if is_json else ("", "")
        if entry_or_none.is_number and quotes == ('"', '"'):
            return entry_or_none.value
        written = self._written(entry_or_none, is_json)
        if opening == "%3c" or opening == "%3C":
            written = quote(entry_or_none.value, safe="")
        elif opening.startswith("&"):
            written = html.escape(entry_or_none.value, quote=False)
        after = "" if closing else match["close"] or ""
        return f"{quotes[0]}{before}{written}{rest}{after}{quotes[1]}"

    @staticmethod
    def _written(entry: Entry, is_json: bool) -> str:
        if not is_json:
            return entry.value
        return entry.json_text if entry.json_text is not None else escape_json(entry.value)

    def may_begin_at(self, text: str, start: int, *, is_json: bool = False) -> bool:
        """Whether text[start:] could be the beginning of something that `restore` would change."""
        rest = text[start:]
        if is_json and rest[0] == '"':
            rest = rest[1:]
        folded = rest.casefold()
        if any(opening.startswith(folded) for opening in _OPENINGS):
            return True
        opened = next((each for each in sorted(_OPENINGS, key=len, reverse=True) if folded.startswith(each)), "")
        inner = rest[len(opened) :]
        if opened:
            inner = inner[1:] if inner[:1].isspace() else inner
        elif start and text[start - 1].isascii() and text[start - 1].isalnum():
            return False
        return self._may_be_typed(inner) or self._may_be_surrogate(rest)

    def _may_be_typed(self, inner: str) -> bool:
        letters = re.match(r"[A-Za-z]*", inner)
        assert letters is not None
        word, tail = letters[0].upper(), inner[letters.end() :]
        if not tail:
            return any(kind.startswith(word) for kind in self._kinds)
        return word in self._kinds and _TAIL.fullmatch(tail.rstrip('"')) is not None

    def _may_be_surrogate(self, rest: str) -> bool:
        skeleton = letters_and_digits(rest)
        if not skeleton:  # signs that a surrogate begins with
            return any(entry.placeholder.startswith(rest) for entry in self._surrogates.values())
        return any(known.startswith(skeleton) for known in self._surrogates)

    def _pattern(self, is_json: bool) -> re.Pattern[str]:
        if is_json not in self._patterns:
            kinds = "|".join(sorted(self._kinds, key=len, reverse=True))
            typed = (
                rf"(?:(?P<open>{_ANY_OPENING})\s?|(?<![A-Za-z0-9]))(?P<kind>{kinds})(?:\\{{0,2}}[_ \u00a0#:\-])?"
                r"(?P<number>\d{4,6})(?!\d)(?P<tail>\\{0,2}[_.\-](?P<spelling>\d{1,3})(?!\d))?"
                rf"(?P<close>\s?(?:{_ANY_CLOSING}))?"
            )
            known = sorted((entry.placeholder for entry in self._surrogates.values()), key=len, reverse=True)
            surrogates = "|".join(map(surrogate_pattern, known)) or "(?!)"
            quotes = ('(?P<quote>"?)', '(?P<unquote>(?(quote)"?))') if is_json else ("", "")
            self._patterns[is_json] = re.compile(
                rf"{quotes[0]}{typed}{quotes[1]}|(?<![A-Za-z0-9])(?P<surrogate>{surrogates})(?![A-Za-z0-9])",
                re.IGNORECASE,
            )
        return self._patterns[is_json]

    def to_json(self) -> str:
        """The whole map, values and all, for whoever asks for it: keep it as private as the texts.

        Example:
            >>> placeholders = PlaceholderMap(random.Random(0))
            >>> sent = placeholders.placeholder_for("IP", "10.0.0.7", "10.0.0.7")
            >>> PlaceholderMap.from_json(placeholders.to_json()).restore(sent)
            '10.0.0.7'
        """
        rows = [
            {"number": number, "spelling": spelling, **vars(entry)}
            for (number, spelling), entry in self._entries.items()
        ]
        return json.dumps({"format": 1, "style": self._style, "entries": rows})

    @classmethod
    def from_json(cls, text: str) -> PlaceholderMap:
        """The map that `to_json` wrote.

        Raises:
            InputError: the text is no such map.
        """
        try:
            fields = json.loads(text)
            made = cls(random.SystemRandom(), style=fields["style"])
            for row in fields["entries"]:
                made._add(row)
        except (ValueError, KeyError, TypeError, RecursionError):
            raise InputError("this is no map of placeholders; give the file that --save-map wrote") from None
        return made

    def _add(self, row: Mapping[str, Any]) -> None:
        number, spelling = int(row["number"]), int(row["spelling"])
        entry = Entry(
            str(row["placeholder"]),
            str(row["kind"]),
            str(row["identity"]),
            str(row["value"]),
            None if row["json_text"] is None else str(row["json_text"]),
            bool(row["is_number"]),
        )
        if not KIND_PATTERN.fullmatch(entry.kind) or not 0 <= number <= _MAX_NUMBER:
            raise ValueError
        self._kinds.add(entry.kind)
        self._taken.add(number)
        self._numbers[entry.kind, entry.identity] = number
        self._entries[number, spelling] = entry
        self._by_writing[number, entry.value, entry.json_text, entry.is_number, False] = entry
        if not entry.placeholder.startswith("<"):
            self._surrogates[letters_and_digits(entry.placeholder)] = entry

    def __repr__(self) -> str:
        counts: dict[str, int] = {}
        for entry in self._entries.values():
            counts[entry.kind] = counts.get(entry.kind, 0) + 1
        return f"PlaceholderMap({', '.join(f'{kind}: {count}' for kind, count in sorted(counts.items()))})"

    def __reduce__(self) -> NoReturn:
        raise TypeError("a map of placeholders is not pickled; ask for it with to_json")


def _typed(kind: str, number: int, spelling: int) -> str:
    return f"<{kind}_{number}>" if spelling == 1 else f"<{kind}_{number}_{spelling}>"

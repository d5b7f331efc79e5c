"""Redaction: what is private in a request is replaced before it leaves, and put back in what comes.

    with Redactor() as redactor:
        request = redactor.request()
        sent = request.redact("Write to ann@example.org")       # Write to <EMAIL_4821>
        answer = ask_the_cloud(sent.text)
        print(request.restore(answer))

It fails closed: where a detector fails or takes too long, where a text is too long to be looked at, or where a value
that was found still stands somewhere, `RedactionError` or `InputError` is raised and there is nothing to send.

All that a detector found once is replaced everywhere in the request, also where no detector would have seen it.
Overlapping findings are replaced together. Texts that look like placeholders are replaced too, so that restoring is
exact.
"""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

from cotune.errors import InputError, RedactionError
from cotune.ledger import EgressLedger, LedgerEntry
from cotune.sandwich.detect import Finder, Passage
from cotune.sandwich.detector_process import DetectorProcess
from cotune.sandwich.detector_table import DetectorSettings
from cotune.sandwich.finding import Finding, merge_overlaps
from cotune.sandwich.folding import FoldedText, fold_views
from cotune.sandwich.json_text import clip_to_tokens, escape_json, is_json_document, unescape_json
from cotune.sandwich.placeholders import LITERAL, PlaceholderMap, Style
from cotune.sandwich.restore_stream import StreamRestorer

WAY = "sandwich"
"""The ledger's word for what leaves this way."""
MAX_CHARS = 1_000_000
_CHAT_KEPT = ("role", "type", "model", "object", "finish_reason")
_MAX_DEPTH = 100
_ANYWHERE_CHARS = 8  # values at least this long are looked for inside of words too
_MIN_REPEATED_CHARS = 3
_MAX_LOOKS = 8

Known = Mapping[str, tuple[str, str]]
"""Folded values, with their kind and identity."""


@dataclass(frozen=True)
class Replacement:
    """One replaced value: where it stood, what stands there now.

    Args:
        start, end: in the text as it was.
        sent_start, sent_end: in the text that is sent.
    """

    kind: str
    start: int
    end: int
    sent_start: int
    sent_end: int


@dataclass(frozen=True)
class Redacted:
    """A text that may be sent.

    Args:
        text: it.
        replacements: in order; they hold no values.
    """

    text: str
    replacements: tuple[Replacement, ...] = field(default=(), repr=False)

    @property
    def counts(self) -> dict[str, int]:
        """How many values were replaced, by kind."""
        return dict(sorted(Counter(each.kind for each in self.replacements).items()))

    @property
    def payload(self) -> bytes:
        """What travels: UTF-8."""
        return self.text.encode("utf-8", errors="surrogatepass")

    def record(self, ledger: EgressLedger, kind: str = "request") -> LedgerEntry:
        """Write into the ledger that this leaves, by way `sandwich`."""
        return ledger.record(WAY, kind, self.payload)


@dataclass(frozen=True)
class RedactedJson:
    """A JSON value that may be sent.

    Args:
        value: it.
        counts: how many values were replaced, by kind.
    """

    value: Any
    counts: Mapping[str, int]

    @property
    def payload(self) -> bytes:
        """What travels: compact JSON in UTF-8."""
        return json.dumps(self.value, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "surrogatepass")

    def record(self, ledger: EgressLedger, kind: str = "request") -> LedgerEntry:
        """Write into the ledger that this leaves, by way `sandwich`."""
        return ledger.record(WAY, kind, self.payload)


class Redactor:
    """Makes requests; keeps the detectors' process and which numbers were given out.

    Args:
        settings: which detectors look.
        style: `typed` placeholders, or a `surrogate` of the same form where there is one.
        timeout_s: for each detector and request.
        max_chars: of one request; longer ones are refused.
        finder: another way to look than a `DetectorProcess` with these settings.

    Raises:
        InputError: a setting that cannot be.

    Example:
        >>> with Redactor() as redactor:
        ...     request = redactor.request(random.Random(0))
        ...     sent = request.redact("Ann's address is ann@x.org.").text
        ...     sent, request.restore(sent)
        ("Ann's address is <EMAIL_7311>.", "Ann's address is ann@x.org.")
    """

    def __init__(
        self,
        settings: DetectorSettings | None = None,
        *,
        style: Style = "typed",
        timeout_s: float = 5.0,
        max_chars: int = MAX_CHARS,
        finder: Finder | None = None,
    ) -> None:
        if max_chars < 1:
            raise InputError(f"max_chars is {max_chars}, expected at least 1")
        if finder is not None and settings is not None:
            raise InputError("settings and finder are both given, expected one; the settings would not be read")
        self._style: Style = style
        self._max_chars = max_chars
        self._taken: set[int] = set()
        PlaceholderMap(random.Random(0), style=style)  # refuses an unknown style now
        self._finder = finder or DetectorProcess(settings or DetectorSettings(), timeout_s=timeout_s)

    def request(self, generator: random.Random | None = None) -> RedactedRequest:
        """A request, or a conversation: its own map of placeholders, which shares none with any other's.

        Args:
            generator: draws the placeholders; the operating system's randomness if left out.
        """
        placeholders = PlaceholderMap(generator or random.SystemRandom(), taken=self._taken, style=self._style)
        return RedactedRequest(self._finder, placeholders, max_chars=self._max_chars)

    def anew(self) -> Redactor:
        """The same detectors, and no number given out yet: for a run that has to draw the same placeholders again.

        The detectors end with the one that it was made of.
        """
        return Redactor(style=self._style, max_chars=self._max_chars, finder=self._finder)

    def close(self) -> None:
        """End the detectors' process."""
        self._finder.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class RedactedRequest:
    """One request or conversation: redacts what goes, restores what comes.

    Args:
        finder: looks for private values.
        placeholders: the map, empty at first.
        max_chars: of what is redacted at once.
    """

    def __init__(self, finder: Finder, placeholders: PlaceholderMap, *, max_chars: int = MAX_CHARS) -> None:
        self._finder = finder
        self._placeholders = placeholders
        self._max_chars = max_chars

    @property
    def placeholders(self) -> PlaceholderMap:
        """The map; `to_json` gives it away."""
        return self._placeholders

    def redact(self, text: str) -> Redacted:
        """Redact a text.

        Raises:
            RedactionError: a detector failed, or something private is left; nothing may be sent.
            InputError: the text is too long, or a detector cannot be had.
        """
        return self._redact_passages([Passage(text)])[0]

    def redact_arguments(self, text: str) -> Redacted:
        """Redact a JSON document that travels as text, such as the arguments of a tool call; it stays one.

        Raises:
            RedactionError, InputError: as `redact`; also if the text is no JSON object or array.
        """
        if not is_json_document(text):
            raise InputError("the arguments are no JSON object or array; redact them as text")
        return self._redact_passages([Passage(text, is_json=True)])[0]

    def redact_json(self, value: Any, *, redact_keys: bool = True, keep: Sequence[str] = ()) -> RedactedJson:
        """Redact all strings and numbers in a JSON value; strings that are JSON documents, inside as well.

        Args:
            value: dicts, lists, strings, numbers, booleans, None.
            redact_keys: the names of fields too.
            keep: names of fields whose strings and numbers are sent as they are.

        Raises:
            RedactionError, InputError: as `redact`; also for what is no JSON, or deeper than 100.
        """
        passages: list[Passage] = []
        numbers: set[int] = set()

        def collect(passage: Passage, original: Any) -> Any:
            if not isinstance(original, str):
                numbers.add(len(passages))
            passages.append(passage)
            return original

        _walk(value, "", frozenset(keep), redact_keys, collect)
        redacted = iter(self._redact_passages(passages, numbers=frozenset(numbers)))
        counts: Counter[str] = Counter()

        def put(passage: Passage, original: Any) -> Any:
            done = next(redacted)
            counts.update(done.counts)
            return done.text if done.replacements else original

        sent = _walk(value, "", frozenset(keep), redact_keys, put)
        return RedactedJson(sent, dict(sorted(counts.items())))

    def redact_messages(self, messages: Sequence[Mapping[str, Any]]) -> RedactedJson:
        """Redact the messages of a chat request: contents, names, tool calls and tool results.

        Roles and types stay, and so do the names of fields.

        Raises:
            RedactionError, InputError: as `redact`.
        """
        return self.redact_json(list(messages), redact_keys=False, keep=_CHAT_KEPT)

    def restore(self, text: str) -> str:
        """Put the values back into an answer; an unknown placeholder is marked."""
        return self._placeholders.restore(text)

    def restore_arguments(self, text: str) -> str:
        """Put the values back into a JSON document that travels as text, escaped as it asks for."""
        return self._placeholders.restore(text, is_json=True)

    def restore_json(self, value: Any) -> Any:
        """Put the values back into all strings and names of fields of a JSON value.

        Raises:
            RedactionError: two fields of one object get the same name.
        """
        return _restore_value(value, self._placeholders, 0)

    def restore_stream(self, *, is_json: bool = False) -> StreamRestorer:
        """Restores an answer while it comes."""
        return StreamRestorer(self._placeholders, is_json=is_json)

    def _redact_passages(self, passages: Sequence[Passage], numbers: frozenset[int] = frozenset()) -> list[Redacted]:
        """Redact passages of one request together; those at the places in `numbers` are numbers of a JSON value."""
        length = sum(len(passage.text) for passage in passages)
        if length > self._max_chars:
            raise InputError(
                f"the text has {length} characters, expected at most {self._max_chars}; nothing is sent; shorten it"
            )
        for passage in passages:
            self._placeholders.avoid(passage.text)
        found = self._finder.find(passages)
        known = self._known_values(passages, found)
        self._placeholders.expect_kinds({finding.kind for findings in found for finding in findings})
        # Before anything is drawn, which avoids all these texts anyway.
        literals = [[*self._placeholders.touched(passage.text)] for passage in passages]
        redacted = []
        for index, passage in enumerate(passages):
            views = _case_views(passage.text, passage.is_json)
            findings = [*found[index], *_repeated(views, known)]
            findings += [Finding(*place, LITERAL, passage.text[slice(*place)]) for place in literals[index]]
            redacted.append(self._replace(passage, _cover_all(passage, findings, known), index in numbers))
        return redacted

    def _known_values(self, passages: Sequence[Passage], found: list[list[Finding]]) -> Known:
        """All values of the conversation, folded, with their kind and identity."""
        known: dict[str, tuple[str, str]] = {}
        for entry in self._placeholders.entries:
            if entry.kind != LITERAL:
                known.setdefault(_searched(entry.value), (entry.kind, entry.identity))
        for passage, findings in zip(passages, found, strict=True):
            for finding in findings:
                value = _searched(passage.text[finding.start : finding.end], is_json=passage.is_json)
                known.setdefault(value, (finding.kind, finding.identity))
        return {value: what for value, what in known.items() if _is_worth_searching(value)}

    def _replace(self, passage: Passage, findings: list[Finding], is_number: bool) -> Redacted:
        text = passage.text
        pieces = clip_to_tokens(text, findings) if passage.is_json else [(each, is_number) for each in findings]
        if is_number and findings:  # half a number is none
            pieces = [(Finding(0, len(text), findings[0].kind, findings[0].identity), True)]
        written, replacements, end, length = [], [], 0, 0
        for finding, piece_is_number in pieces:
            before = text[end : finding.start]
            surface = text[finding.start : finding.end]
            is_glued = (
                text[finding.start - 1 : finding.start].isalnum() or text[finding.end : finding.end + 1].isalnum()
            )
            value = unescape_json(surface) if passage.is_json and not piece_is_number else surface
            placeholder = self._placeholders.placeholder_for(
                finding.kind,
                finding.identity,
                value,
                # Only where it is written otherwise than JSON has to: plain text and JSON share their placeholders.
                json_text=surface if passage.is_json and escape_json(value) != surface else None,
                is_number=piece_is_number,
                is_glued=is_glued or piece_is_number,
            )
            if passage.is_json and piece_is_number:
                placeholder = f'"{placeholder}"'
            start = length + len(before)
            length = start + len(placeholder)
            replacements.append(Replacement(finding.kind, finding.start, finding.end, start, length))
            written += [before, placeholder]
            end = finding.end
        return Redacted("".join([*written, text[end:]]), tuple(replacements))


def _searched(value: str, *, is_json: bool = False) -> str:
    return FoldedText.of(value, escapes="json" if is_json else "unicode").casefolded().text.strip()


def _is_worth_searching(value: str) -> bool:
    """Short values stand everywhere: a detector that calls 5 a person has found one of them, not all."""
    kept = [letter for letter in value if letter.isalnum()]
    return len(kept) >= (_MIN_REPEATED_CHARS if value.isascii() else _MIN_REPEATED_CHARS - 1)


def _places(text: str, value: str) -> Iterator[tuple[int, int]]:
    """Where a folded value stands in a folded text: as whole words, long values anywhere."""
    start = text.find(value)
    while start >= 0:
        end = start + len(value)
        is_inside = (text[start].isalnum() and text[start - 1 : start].isalnum()) or (
            text[end - 1].isalnum() and text[end : end + 1].isalnum()
        )
        if len(value) >= _ANYWHERE_CHARS or not value.isascii() or not is_inside:
            yield start, end
        start = text.find(value, start + 1)


def _repeated(views: Sequence[FoldedText], known: Known) -> Iterator[Finding]:
    """Known values wherever they stand in a passage."""
    for view in views:
        for value, (kind, identity) in known.items():
            for start, end in _places(view.text, value):
                yield Finding(*view.original_span(start, end), kind, identity)


def _cover_all(passage: Passage, findings: list[Finding], known: Known) -> list[Finding]:
    """Merge findings, and look once more at what is left between them: the gate's last word.

    A value may first become a word of its own where something beside it is cut out.
    """
    merged = merge_overlaps(findings)
    for _ in range(_MAX_LOOKS):
        gaps = _gaps(passage, merged)
        left = _values_in([passage.text[start:end] for start, end in gaps], passage.is_json, known)
        if not left:
            return merged
        again = [
            Finding(gap_start + finding.start, gap_start + finding.end, finding.kind, finding.identity)
            for gap_start, gap_end in gaps
            for finding in _repeated(_case_views(passage.text[gap_start:gap_end], passage.is_json), left)
        ]
        merged = merge_overlaps([*merged, *again])
    kind = next(iter(left.values()))[0]
    raise RedactionError(
        f"a value of kind {kind} would be left in the text, so nothing is sent; report how the text writes it"
    )


def _gaps(passage: Passage, merged: Sequence[Finding]) -> list[tuple[int, int]]:
    starts = [0, *(each.end for each in merged)]
    ends = [*(each.start for each in merged), len(passage.text)]
    return [(start, end) for start, end in zip(starts, ends, strict=True) if start < end]


def _values_in(texts: Sequence[str], is_json: bool, known: Known) -> Known:
    """The known values that stand in one of these texts."""
    views = [_case_views(text, is_json) for text in texts]
    num_views = max(map(len, views), default=0)
    joined = ["\0".join(each[index % len(each)].text for each in views) for index in range(num_views)]
    return {value: what for value, what in known.items() if any(any(_places(text, value)) for text in joined)}


def _case_views(text: str, is_json: bool) -> list[FoldedText]:
    return [view.casefolded() for view in fold_views(text, is_json=is_json)]


Put = Callable[[Passage, Any], Any]


def _walk(value: Any, name: str, keep: frozenset[str], redact_keys: bool, put: Put, depth: int = 0) -> Any:
    """Rebuild a JSON value with `put` in the place of each string, number and name, always in the same order."""
    if depth > _MAX_DEPTH:
        raise InputError(f"the JSON value is deeper than {_MAX_DEPTH}, expected less; nothing is sent")
    if isinstance(value, str):
        return value if name in keep else put(_passage(value, name), value)
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, int | float):
        return value if name in keep else put(Passage(json.dumps(value), _context(name)), value)
    if isinstance(value, list | tuple):
        return [_walk(each, name, keep, redact_keys, put, depth + 1) for each in value]
    if isinstance(value, dict):
        rebuilt = {}
        for key, each in value.items():
            if not isinstance(key, str):
                raise InputError(f"the name of a field is of type {type(key).__name__}, expected str")
            sent_key = put(Passage(key), key) if redact_keys and key not in keep else key
            rebuilt[sent_key] = _walk(each, key, keep, redact_keys, put, depth + 1)
        return rebuilt
    raise InputError(
        f"a value of type {type(value).__name__} is no JSON, expected dict, list, str, number, bool or None"
    )


def _passage(text: str, name: str) -> Passage:
    if is_json_document(text):
        return Passage(text, is_json=True)
    return Passage(text, _context(name))


def _context(name: str) -> str:
    """What a detector reads before a field: `phone: 4155552671` is a telephone number."""
    return f"{name}: " if name else ""


def _restore_value(value: Any, placeholders: PlaceholderMap, depth: int) -> Any:
    if depth > _MAX_DEPTH:
        raise InputError(f"the JSON value is deeper than {_MAX_DEPTH}, expected less")
    if isinstance(value, str):
        if is_json_document(value):
            return placeholders.restore(value, is_json=True)
        number = placeholders.number_for(value)
        return placeholders.restore(value) if number is None else number
    if isinstance(value, list | tuple):
        return [_restore_value(each, placeholders, depth + 1) for each in value]
    if isinstance(value, dict):
        restored = {
            placeholders.restore(str(key)): _restore_value(each, placeholders, depth + 1) for key, each in value.items()
        }
        if len(restored) != len(value):
            raise RedactionError("two fields of an object have the same name once restored; ask the cloud again")
        return restored
    return value

"""How much private got out: counted in all that was ever sent, without a judge.

A unit is a private value that a data set marks, or that a user names. Everything that was sent counts together,
training included, since one request is sent many times under many prompts and whoever keeps all of it reads all of it.

    leak_rate    share of units that stand in something sent, whatever the case, the spaces and the escapes
    leak_fuzzy   share of units of which 80 % of the words stand close together in something sent
    any_leak     share of requests of which a unit leaked

Each of the three also with `_own`: of what was sent without the pieces that are public anyway, such as descriptions of
the cloud's own tools. `newpass` stands in the parameter new_password of every such description, whoever asks; the first
count takes that for a leak of the user who chose this word, since it reads bytes and nothing else. The second does not,
and still counts the word wherever else it stands.

    leak_words   share of units that stand, outside of what is public, as words of their own

The counts above leave out spaces, so that no way to part a value hides it; so they also find `newpass` in "your new
password?", and John in Johnson. The last one does not: how far it is below them is what such chance comes to.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from cotune.errors import InputError
from cotune.sandwich.chat import ChatRequest
from cotune.sandwich.cloud_gate import CloudGate
from cotune.sandwich.folding import FoldedText, fold_views
from cotune.sandwich.redact import RedactedJson, RedactedRequest

_WORD = re.compile(r"\w+")
_FUZZY_SHARE = 0.8
_ATTACK = (
    "Somebody replaced private values in the text below by placeholders. Guess each of them from the rest of the text. "
    "Answer with one line for each placeholder: the placeholder, an equals sign, and your guess."
)


@dataclass(frozen=True, kw_only=True)
class LeakMetrics:
    """What leaked.

    Attributes:
        num_units, num_requests: that were looked for.
        leaked: the units that stand in something sent, by request; they are private.
        leaked_own: those that stand there outside of what is public.
        num_leaked, num_fuzzy, num_any: of units, of units by their words, of requests.
        num_fuzzy_own: outside of what is public.
        leaked_words: units that stand there as words of their own, by request.
    """

    num_units: int
    num_requests: int
    leaked: tuple[tuple[str, ...], ...]
    num_fuzzy: int
    leaked_own: tuple[tuple[str, ...], ...]
    num_fuzzy_own: int
    leaked_words: tuple[tuple[str, ...], ...]

    def __repr__(self) -> str:
        return f"LeakMetrics({self.to_json()})"

    @property
    def num_leaked(self) -> int:
        return sum(map(len, self.leaked))

    @property
    def num_any(self) -> int:
        return sum(map(bool, self.leaked))

    def to_json(self) -> dict[str, float]:
        """Shares, and what they are of; no unit."""
        units, requests = max(1, self.num_units), max(1, self.num_requests)
        return {
            "units": self.num_units,
            "requests": self.num_requests,
            "leak_rate": self.num_leaked / units,
            "leak_fuzzy": self.num_fuzzy / units,
            "any_leak": self.num_any / requests,
            "leak_rate_own": sum(map(len, self.leaked_own)) / units,
            "leak_fuzzy_own": self.num_fuzzy_own / units,
            "any_leak_own": sum(map(bool, self.leaked_own)) / requests,
            "leak_words": sum(map(len, self.leaked_words)) / units,
        }


def measure_leaks(units: Sequence[Sequence[str]], sent: Iterable[str], public: Iterable[str] = ()) -> LeakMetrics:
    """Look for each request's private units in all that was sent.

    Args:
        units: of each request.
        sent: payloads: `SentLog.payloads`.
        public: whole texts that the cloud knows anyway; a piece of one alone hides nothing, and one that redaction
            changed is not recognised.

    Raises:
        InputError: a unit is empty.

    Example:
        >>> measure_leaks([["Ann Lee", "4711"], ["Bob"]], ["Dear ANN  LEE, ..."]).to_json()["any_leak"]
        0.5
        >>> found = measure_leaks([["newpass"]], ["Reset(new_pass word)"], ["Reset(new_pass word)"])
        >>> found.to_json()["leak_rate_own"]
        0.0
    """
    if not all(_squeezed(unit) for of_one in units for unit in of_one):
        raise InputError("a unit is empty, expected at least one letter or digit; leave it out")
    views = [view.casefolded().text for payload in sent for view in fold_views(payload, is_json=True)]
    leaked, num_fuzzy = _leaks_in(units, views)
    pieces = {form for text in public for form in (_folded(text), _folded(_as_json(text))) if form.strip()}
    leaked_own, num_fuzzy_own, own = leaked, num_fuzzy, views
    if pieces:
        # The longest first: a shorter one may be a part of it.
        public_text = re.compile("|".join(map(re.escape, sorted(pieces, key=len, reverse=True))))
        own = [public_text.sub("\0", view) for view in views]
        leaked_own, num_fuzzy_own = _leaks_in(units, own)
    spaced = [" ".join(view.split()) for view in own]
    leaked_words = tuple(tuple(unit for unit in of_one if _stands_alone(unit, spaced)) for of_one in leaked_own)
    return LeakMetrics(
        num_units=sum(map(len, units)),
        num_requests=len(units),
        leaked=leaked,
        num_fuzzy=num_fuzzy,
        leaked_own=leaked_own,
        num_fuzzy_own=num_fuzzy_own,
        leaked_words=leaked_words,
    )


def _leaks_in(units: Sequence[Sequence[str]], views: Sequence[str]) -> tuple[tuple[tuple[str, ...], ...], int]:
    """The units of each request that stand in a view, and how many of all do by most of their words."""
    squeezed = [_squeezed_text(view) for view in views]
    words = [_WORD.findall(view) for view in views]
    leaked = tuple(
        tuple(unit for unit in of_one if any(_squeezed(unit) in text for text in squeezed)) for of_one in units
    )
    num_fuzzy = sum(
        any(_stands_close(set(_WORD.findall(_folded(unit))), each) for each in words)
        for of_one in units
        for unit in of_one
    )
    return leaked, num_fuzzy


def _stands_alone(unit: str, spaced: Sequence[str]) -> bool:
    """Whether a unit stands as words of its own in texts with one space between words."""
    wanted = re.compile(rf"(?<!\w){re.escape(' '.join(_folded(unit).split()))}(?!\w)")
    return any(wanted.search(text) for text in spaced)


def _as_json(text: str) -> str:
    """As it stands inside of a JSON string."""
    return json.dumps(text, ensure_ascii=False)[1:-1]


def over_redaction(request: str, units: Sequence[str], sent: str) -> float:
    """Share of a request's words outside of its units that are missing in what was sent.

    Example:
        >>> over_redaction("Call Ann about the blue car", ["Ann"], "Call <PERSON_1> about the <TERM_2> car")
        0.2
    """
    rest = _folded(request)
    for unit in sorted(units, key=len, reverse=True):  # a shorter one may be a part of it
        rest = rest.replace(_folded(unit), " ")
    words = _WORD.findall(rest)
    there = set(_WORD.findall(_folded(sent)))
    return sum(word not in there for word in words) / len(words) if words else 0.0


@dataclass(frozen=True, kw_only=True)
class InversionResult:
    """How often an attacker's first guess was right.

    Attributes:
        num_values: placeholders that were guessed at.
        num_right: guesses that are the value, whatever the case and the spaces.
    """

    num_values: int
    num_right: int

    @property
    def top1(self) -> float:
        """Share of right guesses."""
        return self.num_right / max(1, self.num_values)


def invert(
    attacker: CloudGate,
    requests: Sequence[tuple[str, RedactedRequest]],
    *,
    model: str,
    max_tokens: int = 256,
) -> InversionResult:
    """Attack: a language model that reads only what was sent guesses each placeholder's value.

    Args:
        attacker: the door to the model, with its budget and ledger; asked once for each request with placeholders.
        requests: what was sent, and the map that knows the truth, which the attacker does not see.
        model: the attacker's name for itself.
        max_tokens: of one answer.

    Raises:
        BudgetError, WireError: see `CloudGate.ask`.
    """
    num_values = num_right = 0
    for sent, request in requests:
        entries = [entry for entry in request.placeholders.entries if entry.placeholder in sent]
        if not entries:
            continue  # there is nothing to guess
        messages = RedactedJson([{"role": "system", "content": _ATTACK}, {"role": "user", "content": sent}], {})
        asked = ChatRequest(model=model, messages=messages, max_tokens=max_tokens)
        guesses = dict(_guesses(attacker.ask(asked).answer.text))
        num_values += len(entries)
        num_right += sum(guesses.get(entry.placeholder.casefold()) == _squeezed(entry.value) for entry in entries)
    return InversionResult(num_values=num_values, num_right=num_right)


def _guesses(text: str) -> Iterable[tuple[str, str]]:
    for line in text.splitlines():
        placeholder, sign, guess = line.partition("=")
        if sign:
            yield placeholder.strip().casefold(), _squeezed(guess)


def _folded(text: str) -> str:
    return FoldedText.of(text).casefolded().text


def _squeezed(text: str) -> str:
    return _squeezed_text(_folded(text))


def _squeezed_text(folded: str) -> str:
    return "".join(folded.split())


def _stands_close(unit: set[str], words: Sequence[str]) -> bool:
    """Whether enough of a unit's words stand in a run of twice as many words."""
    if not unit.intersection(words):
        return False
    length, needed = 2 * len(unit), _FUZZY_SHARE * len(unit)
    return any(
        len(unit.intersection(words[start : start + length])) >= needed
        for start in range(max(1, len(words) - length + 1))
    )

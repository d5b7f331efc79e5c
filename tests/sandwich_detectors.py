"""Detectors that misbehave, for tests of the gate; imported by the detectors' process too."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Iterator

from cotune.errors import InputError
from cotune.sandwich.finding import Finding


class Failing:
    """Fails, and tells the text in its error."""

    def find(self, text: str) -> Iterator[Finding]:
        raise ValueError(f"cannot read {text}")


class Hanging:
    """Sleeps for ever where the text says so."""

    def find(self, text: str) -> Iterator[Finding]:
        if "hang" in text:
            time.sleep(1000)
        yield from ()


class Backtracking:
    """A regular expression that takes exponential time and lets no other thread run."""

    def find(self, text: str) -> Iterator[Finding]:
        if re.fullmatch(r"(a|a)*b", text):
            yield Finding(0, 1, "TERM", "a")


class Chatty:
    """Prints what it reads, on the very pipe of the answers."""

    def find(self, text: str) -> Iterator[Finding]:
        print("read", text, flush=True)
        print("read", text, file=sys.stderr, flush=True)
        yield Finding(0, 3, "TERM", text[:3])


class Dying:
    """Ends its process."""

    def find(self, text: str) -> Iterator[Finding]:
        raise SystemExit(0)


class OutOfPlace:
    """Finds something after the end of the text."""

    def find(self, text: str) -> Iterator[Finding]:
        yield Finding(0, len(text) + 5, "TERM", text)


def refused() -> Failing:
    """A detector that cannot be had."""
    raise InputError("the detector needs a thing; pip install 'cotune[thing]'")


class Names:
    """Finds Ann and Bob by what stands before them only: Dear, or from."""

    def find(self, text: str) -> Iterator[Finding]:
        for match in re.finditer(r"(?:Dear|from) (Ann|Bob)\b", text):
            yield Finding(match.start(1), match.end(1), "PERSON", match[1].lower())

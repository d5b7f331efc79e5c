"""What a detector finds, the one method that it has, and how findings that overlap become one."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from cotune.errors import InputError

KIND_PATTERN = re.compile(r"[A-Z]{2,16}")
"""How a kind is written: it becomes part of a placeholder, such as `<EMAIL_4821>`."""


@dataclass(frozen=True)
class Finding:
    """A private value in a text: text[start:end].

    Args:
        start, end: in characters, of the text that the detector was given.
        kind: such as EMAIL; 2 to 16 of the letters A to Z.
        identity: what the value is apart from how it is written, such as the digits of a telephone number. Two
            findings of one kind and identity get the same number in their placeholders.

    Raises:
        InputError: a place that cannot be, or a kind written otherwise.

    Example:
        >>> Finding(6, 17, "EMAIL", "ann@x.org")
        Finding(start=6, end=17, kind='EMAIL')
    """

    start: int
    end: int
    kind: str
    identity: str = field(repr=False)  # a private value: it must not get into logs

    def __post_init__(self) -> None:
        if not 0 <= self.start < self.end:
            raise InputError(
                f"start and end of a finding are {self.start} and {self.end}, expected 0 <= start < end; "
                "look at the detector that made it"
            )
        if not KIND_PATTERN.fullmatch(self.kind):
            raise InputError(
                f"kind is {self.kind!r}, expected 2 to 16 of the letters A to Z, such as PERSON; rename it"
            )


class Detector(Protocol):
    """Finds values of one kind, or of several."""

    def find(self, text: str) -> Iterable[Finding]:
        """What of `text` is private; `text` comes folded (`cotune.sandwich.folding`), and places are places in it.

        Findings may overlap and come in any order. An exception means that nothing is known, and nothing is sent.
        """


def merge_overlaps(findings: Iterable[Finding]) -> list[Finding]:
    """Findings that share a character become one, so that no part of any of them stays.

    The longest gives its kind and identity (among equals the first to begin, then the first to come); the place is all
    that they cover. A merged finding that covers more than its longest part gets an identity of its own.

    Returns:
        Findings apart from each other, in the order of the text.

    Example:
        >>> merge_overlaps([Finding(0, 6, "PHONE", "1"), Finding(4, 12, "CARD", "2"), Finding(20, 22, "IP", "3")])
        [Finding(start=0, end=12, kind='CARD'), Finding(start=20, end=22, kind='IP')]
    """
    merged: list[Finding] = []
    cluster: list[Finding] = []
    cluster_end = 0
    for finding in sorted(findings, key=lambda each: each.start):
        if cluster and finding.start >= cluster_end:
            merged.append(_merge(cluster))
            cluster = []
        cluster.append(finding)
        cluster_end = max(cluster_end, finding.end)
    if cluster:
        merged.append(_merge(cluster))
    return merged


def _merge(cluster: Sequence[Finding]) -> Finding:
    longest = max(cluster, key=lambda each: each.end - each.start)
    start, end = cluster[0].start, max(each.end for each in cluster)
    if (start, end) == (longest.start, longest.end):
        return longest
    parts = sorted({f"{each.kind}:{each.identity}" for each in cluster})
    return Finding(start, end, longest.kind, "+".join(parts))

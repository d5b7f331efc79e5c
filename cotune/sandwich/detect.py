"""One detector over one passage: folded, looked at, and told in places of the passage as it was."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from cotune.errors import RedactionError
from cotune.sandwich.finding import Detector, Finding
from cotune.sandwich.folding import FoldedText, fold_views


@dataclass(frozen=True)
class Passage:
    """A text to be redacted.

    Args:
        text: the text.
        context: what stands before it and is not redacted with it, such as the name of its JSON field.
        is_json: whether it is a JSON document, whose strings hold escapes.
    """

    text: str = field(repr=False)
    context: str = field(default="", repr=False)
    is_json: bool = False


class Finder(Protocol):
    """Looks for private values in passages: `DetectorProcess`, or `HereFinder`."""

    def find(self, passages: Sequence[Passage]) -> list[list[Finding]]:
        """For each passage what was found, by places in its text.

        Raises:
            RedactionError: something failed or took too long; nothing may be sent.
        """

    def close(self) -> None:
        """Free what it holds."""


@dataclass(frozen=True)
class FoldedPassage:
    """A passage with its context, folded once for all detectors.

    Args:
        views: see `fold_views`.
        offset: characters of the context.
    """

    views: tuple[FoldedText, ...] = field(repr=False)
    offset: int

    @classmethod
    def of(cls, passage: Passage) -> FoldedPassage:
        """Fold a passage."""
        views = fold_views(passage.context + passage.text, is_json=passage.is_json)
        return cls(tuple(views), len(passage.context))


def detect(detector: Detector, passage: FoldedPassage) -> list[Finding]:
    """What one detector finds in a passage, by places in its text as it was.

    Example:
        >>> from cotune.sandwich.detectors.email import EmailDetector
        >>> detect(EmailDetector(), FoldedPassage.of(Passage("write to ann\u200b@x.org")))
        [Finding(start=9, end=19, kind='EMAIL')]
    """
    offset = passage.offset
    found: dict[tuple[int, int, str], Finding] = {}
    for view in passage.views:
        for finding in detector.find(view.text):
            start, end = _original_span(view, finding)
            if end > offset:
                placed = Finding(max(0, start - offset), end - offset, finding.kind, finding.identity)
                found.setdefault((placed.start, placed.end, placed.kind), placed)
    return list(found.values())


def _original_span(view: FoldedText, finding: Finding) -> tuple[int, int]:
    if finding.end > len(view.text):
        raise ValueError(f"a finding ends at {finding.end}, the text has {len(view.text)} characters")
    return view.original_span(finding.start, finding.end)


class HereFinder:
    """Runs detectors in this process, without a time limit: for tests, and for detectors that cannot hang.

    Args:
        detectors: by name.

    Example:
        >>> from cotune.sandwich.detectors.email import EmailDetector
        >>> HereFinder({"email": EmailDetector()}).find([Passage("ann@x.org")])
        [[Finding(start=0, end=9, kind='EMAIL')]]
    """

    def __init__(self, detectors: Mapping[str, Detector]) -> None:
        self._detectors = dict(detectors)

    def find(self, passages: Sequence[Passage]) -> list[list[Finding]]:
        """See `Finder`."""
        found: list[list[Finding]] = [[] for _ in passages]
        folded = [FoldedPassage.of(passage) for passage in passages]
        for name, detector in self._detectors.items():
            for findings, passage in zip(found, folded, strict=True):
                try:
                    findings.extend(detect(detector, passage))
                except Exception as error:
                    raise failed_detector(name, type(error).__name__) from None
        return found

    def close(self) -> None:
        """See `Finder`."""


def failed_detector(name: str, error: str) -> RedactionError:
    """The error for a detector that failed; tells the kind of its error alone, whose text may hold private values."""
    return RedactionError(
        f"the detector {name} failed with {error}, so nothing is sent; leave it out or repair it", detector=name
    )


def check_findings(name: str, findings: Iterable[Finding], passage: Passage) -> None:
    """Refuse places outside of the passage.

    Raises:
        RedactionError: a finding ends after the text.
    """
    if any(finding.end > len(passage.text) for finding in findings):
        raise failed_detector(name, "a place outside of the text")

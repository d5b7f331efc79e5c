"""Named entities by Microsoft's Presidio Analyzer, behind the extra `cotune[presidio]`.

What is used of its interface: `AnalyzerEngine().analyze(text=, language=, entities=, score_threshold=)`, which gives
objects with `entity_type`, `start`, `end` and `score`. It needs a spaCy model of the language, which it does not bring.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from typing import Any

from cotune.errors import InputError
from cotune.sandwich.finding import Finding

# Its names for what our own detectors find too; any other becomes the first 16 of its letters.
KINDS = {
    "EMAIL_ADDRESS": "EMAIL",
    "PHONE_NUMBER": "PHONE",
    "IBAN_CODE": "IBAN",
    "CREDIT_CARD": "CARD",
    "IP_ADDRESS": "IP",
    "URL": "URL",
    "DATE_TIME": "DATE",
}


class PresidioDetector:
    """Finds what a Presidio analyzer finds; identity the text itself.

    Args:
        language: two letters, as Presidio calls it; its model must be installed.
        entities: Presidio's names of what to look for; empty for all that it knows.
        threshold: least score, from 0 to 1.
        engine: another analyzer; made with Presidio's defaults if left out.

    Raises:
        InputError: Presidio is not installed, or a threshold that cannot be.
    """

    def __init__(
        self, *, language: str = "en", entities: tuple[str, ...] = (), threshold: float = 0.4, engine: Any = None
    ) -> None:
        if not 0 <= threshold <= 1:
            raise InputError(f"threshold is {threshold}, expected 0 to 1")
        self._language = language
        self._entities = list(entities) or None
        self._threshold = threshold
        self._engine = engine if engine is not None else _load()

    def find(self, text: str) -> Iterator[Finding]:
        """See `Detector`."""
        results = self._engine.analyze(
            text=text, language=self._language, entities=self._entities, score_threshold=self._threshold
        )
        for result in results:
            # Counted by the library in the text that we gave, not in one that it changed.
            value = text[result.start : result.end]
            if value.strip():
                yield Finding(result.start, result.end, _kind(result.entity_type), value.casefold())


def _kind(entity_type: str) -> str:
    letters = "".join(letter for letter in entity_type.upper() if "A" <= letter <= "Z")
    return KINDS.get(entity_type, letters[:16].ljust(2, "X"))


def _load() -> Any:
    try:
        library = importlib.import_module("presidio_analyzer")
    except ImportError:
        raise InputError(
            "the detector presidio needs a package that is not installed; pip install 'cotune[presidio]', "
            "and a spaCy model: python -m spacy download en_core_web_lg"
        ) from None
    return library.AnalyzerEngine()

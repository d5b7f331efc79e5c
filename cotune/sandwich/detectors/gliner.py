"""Named entities by a GLiNER model (Zaratiana et al., arXiv 2311.08526), behind the extra `cotune[gliner]`.

What is used of its interface: `GLiNER.from_pretrained(model)` and `predict_entities(text, labels, threshold=)`, which
gives dicts with `start`, `end`, `label` and `score`. A model reads some hundreds of words and silently leaves out what
comes after them, so longer texts are read in windows that overlap.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterator
from typing import Any

from cotune.errors import InputError
from cotune.sandwich.finding import Finding

LABELS = ("person", "organization", "location", "date of birth", "medical condition", "username")
_PIECE = re.compile(r"\S{1,40}")  # no word of the model is long, so neither is what one window holds


class GlinerDetector:
    """Finds what a GLiNER model finds; identity the text itself.

    Args:
        model: a model folder or hub name. Look at its licence: each has its own.
        labels: what to look for, in words.
        threshold: least score, from 0 to 1.
        window_words, overlap_words: how much is read at once, and how much of it twice. An entity longer than the
            overlap may be missed where two windows meet. The model counts punctuation as words: stay well under its
            limit.
        loaded: a model that is there already.

    Raises:
        InputError: the package is not installed, or a setting that cannot be.
    """

    def __init__(
        self,
        model: str = "",
        *,
        labels: tuple[str, ...] = LABELS,
        threshold: float = 0.4,
        window_words: int = 120,
        overlap_words: int = 30,
        loaded: Any = None,
    ) -> None:
        if not 0 <= threshold <= 1:
            raise InputError(f"threshold is {threshold}, expected 0 to 1")
        if not 0 <= overlap_words < window_words:
            raise InputError(f"overlap_words is {overlap_words}, expected 0 to window_words - 1 = {window_words - 1}")
        if not labels:
            raise InputError("labels is empty, expected what to look for, such as person")
        self._labels = list(labels)
        self._threshold = threshold
        self._window_words, self._overlap_words = window_words, overlap_words
        self._model = loaded if loaded is not None else _load(model)

    def find(self, text: str) -> Iterator[Finding]:
        """See `Detector`."""
        for start, end in self._windows(text):
            for entity in self._model.predict_entities(text[start:end], self._labels, threshold=self._threshold):
                first, last = start + int(entity["start"]), start + int(entity["end"])
                if text[first:last].strip():
                    yield Finding(first, last, _kind(str(entity["label"])), text[first:last].casefold())

    def _windows(self, text: str) -> Iterator[tuple[int, int]]:
        words = [(each.start(), each.end()) for each in _PIECE.finditer(text)]
        step = self._window_words - self._overlap_words
        for first in range(0, max(1, len(words) - self._overlap_words), step):
            window = words[first : first + self._window_words]
            if window:
                yield window[0][0], window[-1][1]


def _kind(label: str) -> str:
    letters = "".join(letter for letter in label.upper() if "A" <= letter <= "Z")
    return letters[:16].ljust(2, "X")


def _load(model: str) -> Any:
    if not model:
        raise InputError("the detector gliner needs a model: give a folder or a hub name with --gliner-model")
    try:
        library = importlib.import_module("gliner")
    except ImportError:
        raise InputError(
            "the detector gliner needs a package that is not installed; pip install 'cotune[gliner]'"
        ) from None
    return library.GLiNER.from_pretrained(model)

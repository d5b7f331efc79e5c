"""Redactors for tests: all rules and a dictionary in this process, without the time limit's process."""

from __future__ import annotations

from typing import Any

from sandwich_detectors import Names

from cotune.sandwich.detect import HereFinder
from cotune.sandwich.detector_table import RULES, DetectorSettings, build_detector
from cotune.sandwich.detectors.dictionary import parse_dictionary
from cotune.sandwich.redact import Redactor

DICTIONARY = "PERSON: Ann Lee | Annie\nPROJECT: Blue Heron\nPERSON: Jürgen Groß\nPERSON: 王小明\n"


def redactor_here(dictionary: str = DICTIONARY, **options: Any) -> Redactor:
    """All rules, the dictionary, and `Names`."""
    settings = DetectorSettings(dictionary=tuple(parse_dictionary(dictionary)))
    detectors = {name: build_detector(name, settings) for name in (*RULES, "dictionary")}
    return Redactor(finder=HereFinder({**detectors, "names": Names()}), **options)

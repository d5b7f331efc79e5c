"""Settings: nothing that is asked for is silently left out."""

from __future__ import annotations

import json
from typing import Any

import pytest
from sandwich_detectors import Names

from cotune.errors import InputError
from cotune.sandwich.detector_table import DETECTORS, RULES, STRICT, DetectorSettings, build_detector
from cotune.sandwich.detectors.dictionary import DictionaryEntry

ANN = (DictionaryEntry(("Ann Lee",), "PERSON"),)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"detectors": ("emial",)}, "no detector 'emial', expected some of email"),
        ({"detectors": ()}, "detectors is empty"),
        ({"detectors": ("email",), "dictionary": ANN}, "dictionary is given and the detector dictionary"),
        ({"detectors": ("dictionary",)}, "there is no dictionary"),
        ({"detectors": ("unlisted",)}, "there is no allow list"),
        ({"detectors": ("email",), "allow_list": ("a",)}, "an allow list is given and the detector unlisted"),
        ({"presidio_language": "de"}, "presidio_language is given"),
        ({"gliner_model": "some"}, "gliner_model is given"),
    ],
)
def test_settings_that_would_do_nothing_are_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        DetectorSettings(**settings)


def test_settings_travel_as_json() -> None:
    settings = DetectorSettings(dictionary=ANN, own=("sandwich_detectors:Names",), endings=("s",))
    assert DetectorSettings.from_json(json.loads(json.dumps(settings.as_json()))) == settings
    assert settings.names == (*RULES, "dictionary", "sandwich_detectors:Names")
    assert "Ann" not in repr(settings)


def test_a_list_of_what_may_stay_makes_it_strict() -> None:
    settings = DetectorSettings(dictionary=ANN, allow_list=("a", "b"))
    assert settings.names == (*RULES, "dictionary", *STRICT)
    assert DetectorSettings.from_json(json.loads(json.dumps(settings.as_json()))) == settings


def test_every_rule_can_be_built_and_has_one_method() -> None:
    settings = DetectorSettings(dictionary=ANN, allow_list=("a",))
    for name in (*RULES, *STRICT, "dictionary"):
        assert list(build_detector(name, settings).find("")) == [], name
    assert set(DETECTORS) == {*RULES, *STRICT, "dictionary", "presidio", "gliner"}


def test_own_detectors_come_by_their_name() -> None:
    settings = DetectorSettings(own=("sandwich_detectors:Names",))
    assert isinstance(build_detector("sandwich_detectors:Names", settings), Names)
    for name in ("no_such_module:Names", "sandwich_detectors:Nobody", "sandwich_detectors"):
        with pytest.raises(InputError, match="cannot be imported"):
            build_detector(name, settings)

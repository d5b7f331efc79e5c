"""One detector over one passage: places, context, what fails."""

from __future__ import annotations

import pytest
from sandwich_detectors import Failing, Names, OutOfPlace

from cotune.errors import RedactionError
from cotune.sandwich.detect import FoldedPassage, HereFinder, Passage, detect
from cotune.sandwich.detectors.phone import PhoneDetector


def test_places_are_those_of_the_text_as_it_was() -> None:
    passage = Passage("\uff46rom \u200bAn\u200bn!")
    (finding,) = {(each.start, each.end) for each in detect(Names(), FoldedPassage.of(passage))}
    assert passage.text[slice(*finding)] == "An\u200bn"


def test_context_is_read_and_not_found() -> None:
    assert [
        (each.start, each.end) for each in detect(PhoneDetector(), FoldedPassage.of(Passage("4155552671", "phone: ")))
    ] == [(0, 10)]
    assert detect(PhoneDetector(), FoldedPassage.of(Passage("4155552671", "id: "))) == []
    assert detect(Names(), FoldedPassage.of(Passage("nobody", "from Ann "))) == []


def test_a_failure_tells_its_kind_and_no_text() -> None:
    with pytest.raises(RedactionError, match="detector broken failed with ValueError") as caught:
        HereFinder({"names": Names(), "broken": Failing()}).find([Passage("secret words")])
    assert caught.value.detector == "broken" and "secret" not in str(caught.value)
    assert caught.value.__cause__ is None and caught.value.__suppress_context__


def test_a_place_outside_of_the_text_is_a_failure() -> None:
    with pytest.raises(RedactionError):
        HereFinder({"odd": OutOfPlace()}).find([Passage("short")])

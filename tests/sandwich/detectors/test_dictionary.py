"""A user's own words: case, boundaries, gaps, endings, scripts."""

from __future__ import annotations

import pytest

from cotune.errors import InputError
from cotune.sandwich.detectors.dictionary import DictionaryDetector, DictionaryEntry, parse_dictionary


def found(dictionary: str, text: str) -> list[tuple[str, str]]:
    detector = DictionaryDetector(parse_dictionary(dictionary))
    return [(text[each.start : each.end], each.kind) for each in detector.find(text)]


@pytest.mark.parametrize(
    ("entry", "text", "word"),
    [
        ("PERSON: Ann Lee", "with ANN  lee.", "ANN  lee"),
        ("PERSON: Ann Lee", "ann.lee@x", "ann.lee"),
        ("PERSON: Ann Lee", "Ann-\nLee", "Ann-\nLee"),
        ("PERSON: Ann", "Ann's cat", "Ann"),
        ("PERSON: Ann", "Ann\u2019s cat", "Ann"),
        ("PERSON: Müller", "Müllers Hund", "Müller"),
        ("Straße", "STRASSE 7", "STRASSE"),
        ("PROJECT: Blue Heron", "blue_heron2 and", "blue_heron"),
        ("PROJECT: R2D2", "r2d2 beeps", "r2d2"),
        ("PERSON: O'Neil", "o\u2019neil", "o\u2019neil"),
        ("PERSON: 王小明", "我叫王小明。", "王小明"),
        ("C++", "in c++ now", "c"),
        ("PERSON: Ελένη", "ΕΛΈΝΗ", "ΕΛΈΝΗ"),
    ],
)
def test_finds_the_word_as_documented(entry: str, text: str, word: str) -> None:
    assert [each for each, _ in found(entry, text)] == [word]


@pytest.mark.parametrize(
    ("entry", "text"),
    [
        ("PERSON: Ann", "Annual, Hannah, annex"),
        ("PERSON: Ann Lee", "Ann went; Lee stayed"),
        ("PERSON: Ann Lee", "Ann      Lee"),
        ("PERSON: Müller", "Muller"),
        ("PROJECT: Blue Heron", "blueheron"),
        ("PROJECT: Blue Heron", "blue, heron"),
    ],
)
def test_leaves_other_words_alone(entry: str, text: str) -> None:
    assert found(entry, text) == []


def test_all_forms_of_an_entry_are_the_same_thing() -> None:
    detector = DictionaryDetector(parse_dictionary("PERSON: Ann Lee | Annie | A. Lee"))
    assert [each.identity for each in detector.find("Annie, A. Lee, ANN LEE")] == ["ann lee"] * 3


def test_endings_are_a_choice() -> None:
    entries = [DictionaryEntry(("Ann",), "PERSON")]
    assert len(list(DictionaryDetector(entries, endings=("ka",)).find("Annka"))) == 1
    assert list(DictionaryDetector(entries, endings=()).find("Anns")) == []


def test_a_file_has_kinds_remarks_and_bare_terms() -> None:
    entries = parse_dictionary("# mine\n\nPERSON: Ann | Annie\nnote: to self\nORG:Acme\n")
    assert [(entry.kind, entry.forms) for entry in entries] == [
        ("PERSON", ("Ann", "Annie")),
        ("TERM", ("note: to self",)),
        ("ORG", ("Acme",)),
    ]


def test_a_bad_line_is_named_and_not_told() -> None:
    with pytest.raises(InputError, match="line 2 of the dictionary") as caught:
        parse_dictionary("PERSON: Ann\nPERSON: Bob | --- \n")
    assert "Bob" not in str(caught.value)


def test_a_word_that_folds_to_nothing_is_refused() -> None:
    with pytest.raises(InputError, match="expected 1 to 200"):
        DictionaryEntry(("\u200b",))
    with pytest.raises(InputError, match="kind"):
        DictionaryEntry(("Ann",), "Person")


def test_repr_tells_no_word() -> None:
    assert "Ann" not in repr(DictionaryEntry(("Ann",), "PERSON"))

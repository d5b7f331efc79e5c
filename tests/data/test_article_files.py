from __future__ import annotations

import pytest

from cotune.data.article_files import parse_story, parse_summary
from cotune.errors import DataError

STORY = """(CNN) -- Rain fell on Rome.

Anna stayed at home

@highlight

Rain in Rome

@highlight

Anna stays in .
"""
SUMMARY = """[SN]URL[SN]
http://example.org/1

[SN]TITLE[SN]
Rain

[SN]FIRST-SENTENCE[SN]
Rain has fallen on Rome.

[SN]RESTBODY[SN]
Share this with
Email
It fell all day.
Anna stayed at home.
"""


def test_a_story_by_hand() -> None:
    assert parse_story(STORY) == {
        "article": "(CNN) -- Rain fell on Rome. Anna stayed at home .",
        "highlights": "Rain in Rome .\nAnna stays in .",
    }
    assert parse_story(STORY.replace("\n", "\r\n")) == parse_story(STORY)


def test_a_summary_by_hand() -> None:
    assert parse_summary(SUMMARY) == {
        "document": "It fell all day.\nAnna stayed at home.",
        "summary": "Rain has fallen on Rome.",
    }


@pytest.mark.parametrize("text", ["", "Rain.", "Rain.\n\n@highlight\n\n", "Rain @highlight Rome"])
def test_a_story_without_a_highlight(text: str) -> None:
    with pytest.raises(DataError, match="the story has no highlight, expected lines '@highlight'"):
        parse_story(text)


def test_a_summary_without_its_parts() -> None:
    with pytest.raises(DataError, match=r"has no part \[SN\]RESTBODY\[SN\], expected"):
        parse_summary("[SN]FIRST-SENTENCE[SN]\nRain.")
    with pytest.raises(DataError, match=r"\[SN\]FIRST-SENTENCE\[SN\] and \[SN\]RESTBODY\[SN\]"):
        parse_summary("Rain.")

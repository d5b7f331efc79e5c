"""API-Bank's calls, and which of their values are private, by hand."""

from __future__ import annotations

import pytest

from cotune.data.api_bank import gold_units, parse_call


@pytest.mark.parametrize(
    ("text", "name", "arguments"),
    [
        ('API-Request: [Counsel(time="2034-02-01 10:00:00")]', "Counsel", {"time": "2034-02-01 10:00:00"}),
        ("I would call Add(a=3, b='x, y') now", "Add", {"a": "3", "b": "x, y"}),
        ("Nothing()", "Nothing", {}),
        ("no call at all", "", {}),
    ],
)
def test_calls_are_read_in_either_quotes(text: str, name: str, arguments: dict[str, str]) -> None:
    assert parse_call(text) == (name, arguments)


def test_units_are_private_arguments_that_stand_in_the_request_as_words() -> None:
    row = {
        "instruction": "I am JOHN Doe, token abc-1, and it is 2023.",
        "calls": ["[F(user_name='john doe', token='abc-1', password='abc', year='2023')]"],
    }
    assert gold_units(row) == {"john doe": "name", "abc-1": "secret", "abc": "secret"}
    assert gold_units({"instruction": "x", "calls": row["calls"]}) == {}

from typing import Any, Literal, NotRequired, Required, TypedDict  # TypedDict needs real hints here

import pytest

from cotune.errors import InputError
from cotune.evaluation.schema import Count, Share, check_keys, check_type


class Point(TypedDict, total=False):
    """A record as the schemas use them."""

    x: Required[float]
    name: NotRequired[str | None]


@pytest.mark.parametrize(
    ("value", "hint"),
    [
        ("a", str),
        (1, int),
        (1, float),
        (0.5, Share),
        (True, bool),
        (None, float | None),
        ([1, 2], list[int]),
        ((1, 2, 3), tuple[int, ...]),
        ([0.1, 0.2], tuple[Share, Share]),
        ("b", Literal["a", "b"]),
        ({"a": 1}, dict[str, Count]),
        ({"x": 1.0}, Point),
        ({"x": 1.0, "name": None}, Point),
        (object(), object),
    ],
)
def test_accepts(value: object, hint: Any) -> None:
    check_type(value, hint, "value")


@pytest.mark.parametrize(
    ("value", "hint", "message"),
    [
        (1, str, r"value is 1 \(int\), expected a string"),
        (True, int, r"value is True \(bool\), expected an integer"),
        (1.0, int, "expected an integer"),
        (1, bool, "expected true or false"),
        (float("nan"), float, "expected a finite number"),
        (1.5, Share, "value is 1.5, expected a number from 0 to 1"),
        (-1, Count, "expected a number at least 0"),
        ("1", float | None, "expected a finite number"),
        ("ab", list[str], "expected a list"),
        ([1, "2"], list[int], r"value\[1\] is '2'"),
        ([0.1], tuple[Share, Share], "value has 1 items, expected 2"),
        ([0.1, 2], tuple[Share, Share], r"value\[1\] is 2"),
        ("c", Literal["a", "b"], "expected one of 'a', 'b'"),
        ([], dict[str, int], "expected an object"),
        ({1: 1}, dict[str, int], "string keys"),
        ({"a": "x"}, dict[str, int], r"value\['a'\] is 'x'"),
        ({}, Point, "value lacks 'x'"),
        ({"x": 1, "y": 2}, Point, "value has unknown keys 'y', expected some of 'name', 'x'"),
        ({"x": "far"}, Point, r"value\['x'\] is 'far'"),
        ("y" * 100, int, r"value is 'y+\.\.\. \(str\)"),
    ],
)
def test_names_the_place_the_value_and_what_was_expected(value: object, hint: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        check_type(value, hint, "value")


def test_keys() -> None:
    check_keys({"a": 1}, {"a", "b"}, frozenset({"a"}), "record")
    with pytest.raises(InputError, match="record lacks 'a'"):
        check_keys({"b": 1}, {"a", "b"}, frozenset({"a"}), "record")

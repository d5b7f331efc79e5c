"""Strict reading of JSON objects."""

from __future__ import annotations

import math

import pytest

from cotune.openai_api.api_error import ApiError
from cotune.openai_api.fields import Fields


def test_what_fits_is_read_and_null_counts_as_left_out() -> None:
    fields = Fields({"a": "x", "b": 3, "c": 0.5, "d": True, "e": "up", "f": None}, "")
    assert (fields.text("a"), fields.integer("b", 0, 3), fields.number("c", 0, 1)) == ("x", 3, 0.5)
    assert fields.flag("d") and fields.choice("e", ("up", "down")) == "up"
    assert fields.text("f") is None and fields.integer("f", 0, 1) is None and fields.flag("f") is False
    assert fields.number("b", 0, 3) == 3.0
    fields.finish()


@pytest.mark.parametrize("value", [None, [], "x", 3, True])
def test_only_objects_have_fields(value: object) -> None:
    with pytest.raises(ApiError, match="expected a JSON object"):
        Fields(value, "cotune")


@pytest.mark.parametrize("value", ["1", 1.0, True, -1, 4, [1]])
def test_integers_are_no_floats_strings_or_booleans(value: object) -> None:
    with pytest.raises(ApiError, match="expected an integer from 0 to 3") as caught:
        Fields({"n": value}, "").integer("n", 0, 3)
    assert caught.value.param == "n"


@pytest.mark.parametrize("value", ["1", True, -0.1, 1.1, math.nan, math.inf, [], 10**400])
def test_numbers_are_finite_and_in_range(value: object) -> None:
    with pytest.raises(ApiError, match=r"x\.n is .*, expected a number from 0 to 1"):
        Fields({"n": value}, "x").number("n", 0, 1)


def test_an_unknown_field_is_refused_by_name_and_a_harmless_one_is_not() -> None:
    fields = Fields({"temprature": 1, "user": "u"}, "")
    with pytest.raises(ApiError, match="'temprature' is not known here") as caught:
        fields.finish(("user",))
    assert caught.value.code == "unknown_parameter"


def test_what_is_not_supported_may_only_ask_for_nothing() -> None:
    Fields({"n": 1, "tools": None}, "").only("n", 1, because="one text is made")
    for value in (2, True, 1.0):  # True and 1.0 equal 1 in Python, and are something else in JSON
        with pytest.raises(ApiError, match="and one text is made; leave it out"):
            Fields({"n": value}, "").only("n", 1, because="one text is made")


def test_a_long_value_does_not_make_a_long_message() -> None:
    with pytest.raises(ApiError) as caught:
        Fields({"n": "x" * 10_000}, "").integer("n", 0, 1)
    assert len(str(caught.value)) < 200

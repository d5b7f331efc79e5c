"""The map of a request: what is drawn, what is found again, and what it does not tell."""

from __future__ import annotations

import copy
import json
import pickle
import random
from typing import Any

import pytest

from cotune.errors import InputError
from cotune.sandwich.placeholders import PlaceholderMap


def with_mail(seed: int = 0) -> tuple[PlaceholderMap, str]:
    placeholders = PlaceholderMap(random.Random(seed))
    sent = placeholders.placeholder_for("EMAIL", "ann@x.org", 'Ann "A" <ann@x.org>')
    return placeholders, sent.strip("<>").partition("_")[2]


VALUE = 'Ann "A" <ann@x.org>'


@pytest.mark.parametrize(
    "form",
    [
        "<EMAIL_{}>",
        "<email_{}>",
        "<Email_{}>",
        "<EMAIL {}>",
        "<EMAIL-{}>",
        "< EMAIL_{} >",
        "<EMAIL_{}",
        "EMAIL_{}",
        "email_{}",
        "Email {}",
        "EMAIL{}",
        "\\<EMAIL\\_{}\\>",
        "\uff1cEMAIL_{}\uff1e",
        "\\u003cEMAIL_{}\\u003e",
    ],
)
def test_what_models_make_of_a_placeholder_is_restored(form: str) -> None:
    placeholders, number = with_mail()
    written = form.format(number)
    assert placeholders.restore(f"To {written}, now") == f"To {VALUE}, now"


@pytest.mark.parametrize(
    ("form", "restored"),
    [
        ("[EMAIL_{}]", f"[{VALUE}]"),
        ("**<EMAIL_{}>**", f"**{VALUE}**"),
        ("<EMAIL_{}>s", f"{VALUE}s"),
        ("<EMAIL_{}>'s", f"{VALUE}'s"),
        ("_EMAIL_{}_", f"_{VALUE}_"),
        ("EMAIL_{}-5", f"{VALUE}-5"),
        ("&lt;EMAIL_{}&gt;", 'Ann "A" &lt;ann@x.org&gt;'),
        ("?q=%3CEMAIL_{}%3E", "?q=Ann%20%22A%22%20%3Cann%40x.org%3E"),
        ("\\<EMAIL_{}>", f"\\{VALUE}"),
        ("<<EMAIL_{}>>", f"<{VALUE}>"),
    ],
)
def test_what_stands_around_it_stays(form: str, restored: str) -> None:
    placeholders, number = with_mail()
    assert placeholders.restore(form.format(number)) == restored


def test_another_number_or_kind_is_marked_and_never_guessed() -> None:
    placeholders, number = with_mail()
    other = str(int(number) - 1)
    for unknown in (f"<EMAIL_{other}>", f"<PHONE_{number}>", f"<EMAIL_{number}_7>"):
        assert placeholders.restore(f"a {unknown} b") == f"a [unknown placeholder {unknown}] b"
    for other_text in (
        f"EMAIL_{other}",
        f"email {other}",
        f"<EMAIL_{number}123>",
        "<EMAIL>",
        "<div_1234>",
        f"XEMAIL_{number}",
    ):
        assert placeholders.restore(other_text) == other_text


def test_same_value_same_placeholder_other_spelling_same_number() -> None:
    placeholders = PlaceholderMap(random.Random(3))
    first = placeholders.placeholder_for("EMAIL", "ann@x.org", "ann@x.org")
    again = placeholders.placeholder_for("EMAIL", "ann@x.org", "ann@x.org")
    spelled = placeholders.placeholder_for("EMAIL", "ann@x.org", "ANN@x.org")
    other = placeholders.placeholder_for("EMAIL", "bob@x.org", "bob@x.org")
    assert first == again and spelled == first[:-1] + "_2>" and other not in (first, spelled)
    assert placeholders.restore(f"{spelled} {first}") == "ANN@x.org ann@x.org"


def test_numbers_are_never_drawn_twice_nor_where_they_stand_already() -> None:
    taken: set[int] = set()
    numbers = set()
    for seed in range(40):
        placeholders = PlaceholderMap(random.Random(0), taken=taken)  # the same generator each time
        placeholders.avoid("the numbers 1000 and " + " ".join(str(number) for number in range(2000, 9000)))
        numbers.add(placeholders.placeholder_for("IP", str(seed), str(seed)))
    assert len(numbers) == 40
    assert all(1000 < int(each[4:-1]) < 2000 or int(each[4:-1]) >= 9000 for each in numbers)


def test_longer_numbers_come_when_short_ones_are_used_up() -> None:
    placeholders = PlaceholderMap(random.Random(0), taken=set(range(1000, 6000)))
    assert len(placeholders.placeholder_for("IP", "a", "a")) == len("<IP_12345>")
    full = PlaceholderMap(random.Random(0), taken=set(range(1000, 1_000_000)))
    with pytest.raises(InputError, match="make another Redactor"):
        full.placeholder_for("IP", "a", "a")


def test_in_json_values_are_escaped_and_numbers_are_numbers() -> None:
    placeholders = PlaceholderMap(random.Random(0))
    text = placeholders.placeholder_for("PERSON", "a", 'Ann "A"\n')
    number = placeholders.placeholder_for("PHONE", "1", "4155552671", is_number=True)
    verbatim = placeholders.placeholder_for("PERSON", "b", "Jé", json_text="J\\u00e9")
    restored = placeholders.restore(
        f'{{"a": "{text}", "n": "{number}", "m": "tel {number}", "v": "{verbatim}"}}', is_json=True
    )
    assert json.loads(restored) == {"a": 'Ann "A"\n', "n": 4155552671, "m": "tel 4155552671", "v": "Jé"}
    assert '"J\\u00e9"' in restored and placeholders.restore(verbatim) == "Jé"


def test_only_a_whole_placeholder_of_a_number_is_a_number() -> None:
    placeholders = PlaceholderMap(random.Random(0))
    number = placeholders.placeholder_for("PHONE", "1", "4155552671", is_number=True)
    text = placeholders.placeholder_for("PHONE", "2", "4155550000")
    assert placeholders.number_for(number) == placeholders.number_for(number.lower().strip("<>")) == 4155552671
    for other in (text, f"{number} ", f'{number}" and "{number}', "", '"', "<PHONE_0000>", "12"):
        assert placeholders.number_for(other) is None


def test_the_map_tells_nothing_unless_asked() -> None:
    placeholders, _ = with_mail()
    told = f"{placeholders} {placeholders!r} {placeholders.entries}"
    assert "ann" not in told.lower() and "PlaceholderMap(EMAIL: 1)" in told
    for leave in (pickle.dumps, copy.deepcopy):
        with pytest.raises(TypeError, match="not pickled"):
            leave(placeholders)


@pytest.mark.parametrize("style", ["typed", "surrogate"])
def test_a_saved_map_restores_the_same(style: Any) -> None:
    placeholders = PlaceholderMap(random.Random(0), style=style)
    sent = [
        placeholders.placeholder_for("EMAIL", "a", "ann@x.org"),
        placeholders.placeholder_for("EMAIL", "a", "ANN@x.org"),
        placeholders.placeholder_for("PROJECT", "h", "Heron", json_text="H\\u0065ron"),
        placeholders.placeholder_for("PHONE", "1", "123456789", is_number=True, is_glued=True),
    ]
    again = PlaceholderMap.from_json(placeholders.to_json())
    text = '{{"a": "{}, {}, {}", "b": "{}"}}'.format(*sent)
    for is_json in (False, True):
        assert again.restore(text, is_json=is_json) == placeholders.restore(text, is_json=is_json) != text


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"style": "typed", "entries": [{}]}', '{"style": "x", "entries": []}']
)
def test_what_is_no_map_is_refused(text: str) -> None:
    with pytest.raises(InputError):
        PlaceholderMap.from_json(text)


def test_an_unknown_style_is_refused() -> None:
    with pytest.raises(InputError, match="style is 'pretty', expected typed or surrogate"):
        PlaceholderMap(random.Random(0), style="pretty")  # type: ignore[arg-type]

from __future__ import annotations

import re
from random import Random

from cotune.data.assistant.questions import (
    add_hours,
    add_prices,
    ask_about_person,
    check_opening,
    convert_units,
    order_appointments,
)
from cotune.data.assistant.voice import VOICES
from cotune.data.assistant.words import NUMBERS

VOICE = VOICES["friendly"]
SEEDS = range(200)
PER_UNIT = {"minutes": 60, "seconds": 60, "days": 7, "hours": 24, "metres": 1000, "centimetres": 100}
PER_UNIT |= {"grams": 1000, "months": 12, "pieces": 12}


def test_conversions_are_right() -> None:
    for seed in SEEDS:
        _, answer = convert_units(Random(seed), VOICE)
        match = re.match(r"(\w+) \w+ are (\d+) (\w+), because", answer)
        assert match is not None
        number, result, unit = match.groups()
        assert int(result) == NUMBERS.index(number.lower()) * PER_UNIT[unit]


def test_sums_are_right() -> None:
    for seed in SEEDS:
        request, answer = add_prices(Random(seed), VOICE)
        first, second = (NUMBERS.index(word) for word in re.findall(r"cost (\w+) euros", request))
        assert f"cost {NUMBERS[first + second]} euros." in answer
        request, answer = add_hours(Random(seed), VOICE)
        match = re.match(r"The .* ends at (\w+), because it starts at (\w+) and takes (\w+) hours?\.", answer)
        assert match is not None
        end, start, hours = (NUMBERS.index(word) for word in match.groups())
        assert end == start + hours


def test_order_and_opening_hours_are_right() -> None:
    for seed in SEEDS:
        request, answer = order_appointments(Random(seed), VOICE)
        hours = [NUMBERS.index(word) for word in re.findall(r" at (\w+)", request)]
        wanted = max(hours) if "last" in request else min(hours)
        assert f", at {NUMBERS[wanted]}." in answer
        request, answer = check_opening(Random(seed), VOICE)
        opening, hour = (NUMBERS.index(word) for word in re.findall(r" at (\w+) in the morning", request))
        assert answer.startswith("Yes" if hour >= opening else "No")


def test_the_answer_is_in_the_text() -> None:
    for seed in SEEDS:
        request, answer = ask_about_person(Random(seed), VOICE)
        name = answer.split()[0]
        assert name in request
        assert set(re.findall(r"\b[A-Z]\w+", answer)) <= set(re.findall(r"\b[A-Z]\w+", request)) | {"The", "This"}

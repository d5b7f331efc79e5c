"""Bugs that others had (the issues of LiteLLM and Presidio named in each test), one test each."""

from __future__ import annotations

import json
import random
import re

import pytest
from redactors import redactor_here
from sandwich_detectors import Failing

from cotune.errors import InputError, RedactionError
from cotune.sandwich.detect import HereFinder, Passage
from cotune.sandwich.detector_table import DetectorSettings
from cotune.sandwich.finding import Finding
from cotune.sandwich.redact import Redactor


@pytest.mark.parametrize(
    "text", ["a@b.org, long.address@example.org: 10.0.0.7 é\u200b王小明 ann@x.org ok", "x" * 50 + " a@b.org"]
)
def test_places_are_those_of_the_original_and_not_of_the_redacted_text(text: str) -> None:
    """LiteLLM 6247, 23037: places counted in the anonymised text cut out the wrong characters."""
    request = redactor_here().request(random.Random(0))
    sent = request.redact(text)
    assert request.restore(sent.text) == text
    for each in sent.replacements:
        cut = request.restore(sent.text[each.sent_start : each.sent_end])
        assert cut == text[each.start : each.end]
    between = re.sub(r"<[A-Z]+_[\d_]+>", "\0", sent.text).split("\0")
    assert all(piece in text for piece in between)


def test_the_map_is_not_lost_between_redacting_and_restoring() -> None:
    """LiteLLM 19950, one half: the map made before the call was not there after it."""
    request = redactor_here().request(random.Random(0))
    first, second = request.redact("ann@x.org").text, request.redact("bob@x.org").text
    assert request.restore(f"{second} {first}") == "bob@x.org ann@x.org"


def test_the_map_is_not_shared_across_requests() -> None:
    """LiteLLM 19950, the other half: another request's values came back."""
    redactor = redactor_here()
    one, other = redactor.request(random.Random(0)), redactor.request(random.Random(0))
    sent, other_sent = one.redact("ann@x.org").text, other.redact("bob@x.org").text
    assert sent != other_sent
    assert one.restore(other_sent) == f"[unknown placeholder {other_sent}]"
    assert "ann" not in other.restore(sent) and "bob" not in one.restore(other_sent)


def test_arguments_of_tool_calls_are_restored() -> None:
    """LiteLLM 31950: the tool was called with placeholders."""
    request = redactor_here().request(random.Random(0))
    person, mail = request.redact("Annie").text, request.redact("annie@x.org").text
    answer = {
        "role": "assistant",
        "content": None,
        "tool_calls": [
            {
                "id": "c",
                "function": {"name": "f", "arguments": json.dumps({"to": [mail], "about": {person: f"Dear {person}"}})},
            }
        ],
    }
    restored = request.restore_json(answer)
    assert json.loads(restored["tool_calls"][0]["function"]["arguments"]) == {
        "to": ["annie@x.org"],
        "about": {"Annie": "Dear Annie"},
    }


def test_arguments_of_tool_calls_are_restored_in_a_stream() -> None:
    """LiteLLM 31950 and 28197 together: pieces of JSON text, and a value that JSON must escape."""
    request = redactor_here('PERSON: Ann "Q" Lee').request(random.Random(0))
    sent = request.redact_arguments(json.dumps({"to": 'Ann "Q" Lee', "n": 1})).text
    placeholder = request.redact('Ann "Q" Lee').text
    for answer in (sent, json.dumps({"to": placeholder, "n": 1})):
        stream = request.restore_stream(is_json=True)
        arguments = "".join([*map(stream.feed, answer), stream.finish()])
        assert json.loads(arguments) == json.loads(request.restore_arguments(answer)) == {"to": 'Ann "Q" Lee', "n": 1}


def test_a_placeholder_in_two_chunks_of_a_stream_is_restored() -> None:
    """LiteLLM 28197, 24291: chunks were looked at one by one."""
    request = redactor_here().request(random.Random(0))
    sent = f"Dear {request.redact('Annie').text}, hello."
    for cut in range(len(sent)):
        stream = request.restore_stream()
        assert stream.feed(sent[:cut]) + stream.feed(sent[cut:]) + stream.finish() == "Dear Annie, hello."


def test_an_option_that_would_do_nothing_is_refused() -> None:
    """LiteLLM 14516: an option was accepted and had no effect."""
    with pytest.raises(InputError):
        DetectorSettings(detectors=("email", "persons"))
    with pytest.raises(InputError):
        DetectorSettings(detectors=("email",), presidio_language="de")
    with pytest.raises(TypeError):
        DetectorSettings(langauge="de")  # type: ignore[call-arg]


def test_an_error_of_a_detector_never_lets_the_raw_text_pass() -> None:
    """LiteLLM 30728: the text was forwarded as it was when the analyser failed."""
    request = Redactor(finder=HereFinder({"broken": Failing()})).request()
    for redact in (request.redact, request.redact_json, lambda text: request.redact_messages([{"content": text}])):
        with pytest.raises(RedactionError):
            redact("ann@x.org")


def test_no_field_of_a_request_is_skipped() -> None:
    """LiteLLM 30728, the rest of it: some kinds of request were not looked at."""
    private = "ann@x.org"
    request = redactor_here().request(random.Random(0))
    bodies = [
        {"prompt": private},
        {"input": [private, {"text": private}]},
        {"messages": [{"role": "user", "content": private, "name": private}]},
        {"tools": [{"function": {"description": private, "parameters": {"enum": [private], "default": private}}}]},
        {"metadata": {private: private}, "user": private, "stop": [private]},
        {"arguments": json.dumps({"deep": json.dumps([private])})},
    ]
    for body in bodies:
        assert private not in request.redact_json(body).payload.decode()


def test_placeholders_cannot_be_looked_up() -> None:
    """Presidio 1845: hashes without a salt are reversed by hashing a dictionary."""
    value = "ann@x.org"
    seen = {redactor_here().request().redact(value).text for _ in range(8)}
    assert len(seen) > 1  # the same value, other placeholders: nothing of the value is in them


def test_each_value_has_its_own_placeholder() -> None:
    """Presidio 1106: two persons became the same <PERSON>."""
    request = redactor_here().request(random.Random(0))
    sent = request.redact("Ann Lee met Jürgen Groß, and Ann Lee left").text
    first, second, third = re.findall(r"<PERSON_\d+>", sent)
    assert first == third != second


def test_a_detector_that_takes_numbers_for_names_spoils_only_what_it_found() -> None:
    """Presidio 1173: numbers as PERSON. One such finding must not replace every 5."""

    class NumbersArePeople:
        def find(self, text: str) -> list[Finding]:
            return [Finding(text.index("5"), text.index("5") + 1, "PERSON", "5")]

    request = Redactor(finder=HereFinder({"odd": NumbersArePeople()})).request(random.Random(0))
    sent = request.redact("5 apples, 15 pears, 5 plums").text
    assert re.fullmatch(r"<PERSON_\d+> apples, 15 pears, 5 plums", sent)


def test_an_unknown_placeholder_is_marked_and_not_guessed() -> None:
    request = redactor_here().request(random.Random(0))
    request.redact("ann@x.org")
    assert request.restore("<EMAIL_1>") == "<EMAIL_1>"  # no number of ours
    assert request.restore("to <EMAIL_0001>") == "to [unknown placeholder <EMAIL_0001>]"


@pytest.mark.parametrize(
    "hidden",
    [
        "an\u200bn@x.org",
        "ann\uff20x\uff0eorg",
        "ann@x\u3002org",
        "ann [at] x [dot] org",
        "ANN@X.ORG",
        "4111\u00a01111\u20111111 1111",
        "\uff14\uff11\uff11\uff11 1111 1111 1111",
        "Ju\u0308rgen  Groß",
        "JÜRGEN GROSS",
        "jürgen_groß",
    ],
)
def test_disguises_are_seen_through(hidden: str) -> None:
    request = redactor_here().request(random.Random(0))
    text = f"it is {hidden}, he said"
    sent = request.redact(text).text
    assert re.fullmatch(r"it is <[A-Z]+_\d+>, he said", sent) and request.restore(sent) == text


def test_passages_do_not_tell_their_text() -> None:
    assert "ann" not in repr(Passage("ann@x.org", "ann"))

"""Requests from end to end: what is sent, what comes back, and what is not sent at all."""

from __future__ import annotations

import json
import random
import re
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import pytest
from redactors import redactor_here
from sandwich_detectors import Failing

from cotune.errors import InputError, RedactionError
from cotune.ledger import EgressLedger
from cotune.sandwich.detect import HereFinder, Passage
from cotune.sandwich.detector_table import DetectorSettings
from cotune.sandwich.finding import Finding
from cotune.sandwich.redact import Redactor


def test_typed_placeholders_keep_the_text_readable() -> None:
    request = redactor_here().request(random.Random(0))
    sent = request.redact("Ann Lee (annie@x.org, +49 30 901820) asked ANNIE about Blue Heron.")
    pattern = r"<PERSON_(\d+)> \(<EMAIL_\d+>, <PHONE_\d+>\) asked <PERSON_(\d+)_2> about <PROJECT_\d+>\."
    match = re.fullmatch(pattern, sent.text)
    assert match is not None and match[1] == match[2]
    assert sent.counts == {"EMAIL": 1, "PERSON": 2, "PHONE": 1, "PROJECT": 1}
    assert request.restore(sent.text) == "Ann Lee (annie@x.org, +49 30 901820) asked ANNIE about Blue Heron."


def test_replacements_say_where_and_hold_no_value() -> None:
    text = "mail ann@x.org and bob@x.org"
    sent = redactor_here().request(random.Random(0)).redact(text)
    for each in sent.replacements:
        assert text[each.start : each.end] in ("ann@x.org", "bob@x.org")
        assert re.fullmatch(r"<EMAIL_\d+>", sent.text[each.sent_start : each.sent_end])
    assert "ann" not in repr(sent.replacements)


def test_what_was_found_once_is_replaced_everywhere_and_later_too() -> None:
    request = redactor_here("TERM: nothing").request(random.Random(0))
    sent = request.redact("Ann is here. A letter from Ann, to ANN; Annual, Hannah.")
    assert "ann" not in re.sub("Annual|Hannah|<[^>]*>", "", sent.text).lower()
    assert "Annual, Hannah" in sent.text
    assert request.redact("And Ann again").text == f"And {sent.text.split()[0]} again"


def test_a_value_that_becomes_a_word_when_its_neighbour_goes_is_replaced_too() -> None:
    class Odd:
        def find(self, text: str) -> list[Finding]:
            return [Finding(m.start(), m.end(), "TERM", m[0]) for m in re.finditer("bob|(?<=-)ann", text)]

    request = Redactor(finder=HereFinder({"odd": Odd()})).request(random.Random(0))
    sent = request.redact("x-ann annbob")
    assert "ann" not in sent.text and request.restore(sent.text) == "x-ann annbob"


def test_a_known_value_that_overlaps_a_finding_goes_whole() -> None:
    class Odd:
        def find(self, text: str) -> list[Finding]:
            return [
                Finding(m.start(1), m.end(1), "TERM", m[1])
                for m in re.finditer("(?=Dear (Ann Lee)|(Lee 77))", text)
                if m[1]
            ] + [Finding(m.start(), m.end(), "IP", m[0]) for m in re.finditer("Lee 77", text)]

    request = Redactor(finder=HereFinder({"odd": Odd()})).request(random.Random(0))
    assert "Ann" not in request.redact("Dear Ann Lee, and Ann Lee 77").text


def test_surrogates_beside_letters_and_for_numbers_come_back() -> None:
    request = redactor_here(style="surrogate").request(random.Random(0))
    glued, arguments = "Nr4111111111111111 4111111111111111", '{"card": 4111111111111111, "to": "ann@x.org"}'
    sent = request.redact(glued).text
    assert re.fullmatch(r"Nr<CARD_\d+> \d{16}", sent) and request.restore(sent) == glued
    sent_arguments = request.redact_arguments(arguments).text
    assert (
        re.fullmatch(r"<CARD_\d+(_\d)?>", json.loads(sent_arguments)["card"])
        and "<" not in json.loads(sent_arguments)["to"]
    )
    assert request.restore_arguments(sent_arguments) == arguments


def test_plain_text_and_json_share_their_placeholders() -> None:
    request = redactor_here().request(random.Random(0))
    sent = request.redact_json({"text": "to ann@x.org", "arguments": '{"to": "ann@x.org"}'}).value
    assert sent["text"].split()[1] == json.loads(sent["arguments"])["to"]


def test_requests_share_no_placeholder_even_with_the_same_generator() -> None:
    redactor = redactor_here()
    seen = [redactor.request(random.Random(0)).redact("to ann@x.org").text for _ in range(30)]
    assert len(set(seen)) == 30


def test_the_same_generator_gives_the_same_text() -> None:
    texts = {redactor_here().request(random.Random(7)).redact("to ann@x.org from bob@x.org").text for _ in range(3)}
    assert len(texts) == 1
    assert (
        redactor_here().request().redact("to ann@x.org").text != redactor_here().request().redact("to ann@x.org").text
    )


def test_text_that_looks_like_a_placeholder_comes_back_as_it_was() -> None:
    request = redactor_here().request(random.Random(0))
    number = request.redact("ann@x.org").text[7:-1]
    text = f"what is <EMAIL_{number}>, email {number}, <PHONE_9999> and <PROJECT_1234>? Blue Heron"
    sent = request.redact(text)
    assert sent.counts == {"PROJECT": 1, "TEXT": 4}
    assert number not in sent.text and request.restore(sent.text) == text


BODY = {
    "model": "any",
    "messages": [
        {"role": "system", "content": "You help Ann Lee."},
        {"role": "user", "content": [{"type": "text", "text": "Mail annie: ann.lee@x.org"}]},
        {
            "role": "assistant",
            "tool_calls": [
                {
                    "id": "call_1",
                    "type": "function",
                    "function": {
                        "name": "send",
                        "arguments": '{"to": "Ann \\u200bLee <ann.lee@x.org>", "tel": 4155552671, "n": [1, true]}',
                    },
                }
            ],
        },
        {"role": "tool", "tool_call_id": "call_1", "content": '{"status": "sent to ann.lee@x.org"}', "name": "Annie"},
    ],
}


def test_messages_tool_calls_and_tool_results_are_redacted_and_come_back() -> None:
    request = redactor_here().request(random.Random(0))
    sent = request.redact_messages(BODY["messages"])  # type: ignore[arg-type]
    written = sent.payload.decode().lower()
    for private in ("ann", "lee", "x.org", "4155552671"):
        assert private not in written
    arguments = json.loads(sent.value[2]["tool_calls"][0]["function"]["arguments"])
    assert re.fullmatch(r"<PHONE_\d+>", arguments["tel"]) and arguments["n"] == [1, True]
    assert [message["role"] for message in sent.value] == ["system", "user", "assistant", "tool"]
    assert request.restore_json(sent.value) == BODY["messages"]


@pytest.mark.parametrize("written", ["{}", "<{}>", "{} "])
def test_a_number_is_a_number_again_alone_and_text_in_text(written: str) -> None:
    request = redactor_here().request(random.Random(0))
    placeholder = request.redact_json({"phone": 4155552671.0}).value["phone"].strip("<>")
    restored = request.restore_json({"a": written.format(placeholder)})["a"]
    assert restored == (4155552671.0 if not written.endswith(" ") else "4155552671.0 ")
    assert isinstance(restored, str | float)


def test_names_of_fields_are_redacted_in_free_json_and_kept_where_asked() -> None:
    request = redactor_here().request(random.Random(0))
    value = {"ann@x.org": {"Annie": 1}, "keep": "Annie", "list": ["Annie", 2.5, None, False]}
    sent = request.redact_json(value, keep=("keep",))
    assert "Annie" not in json.dumps({**sent.value, "keep": ""}) and sent.value["keep"] == "Annie"
    assert request.restore_json(sent.value) == value


def test_two_names_that_restore_to_one_are_an_error() -> None:
    request = redactor_here().request(random.Random(0))
    sent = request.redact("ann@x.org").text
    with pytest.raises(RedactionError, match="same name"):
        request.restore_json({sent: 1, sent.lower(): 2})


def test_arguments_stay_json_and_come_back_to_the_last_space() -> None:
    request = redactor_here().request(random.Random(0))
    text = '{ "to" :"Ann\\u0020Lee",  "url": "https:\\/\\/x.org\\/a", "card": 4111111111111111 }'
    sent = request.redact_arguments(text)
    assert set(json.loads(sent.text)) == {"to", "url", "card"} and sent.counts == {"CARD": 1, "PERSON": 1, "URL": 1}
    assert request.restore_arguments(sent.text) == text
    with pytest.raises(InputError, match="no JSON object"):
        request.redact_arguments("to Ann")


@pytest.mark.parametrize("style", ["typed", "surrogate"])
def test_streams_of_a_request(style: Any) -> None:
    request = redactor_here(style=style).request(random.Random(0))
    sent = request.redact("Ann Lee, ann@x.org, 4111 1111 1111 1111").text
    stream = request.restore_stream()
    assert "".join([*map(stream.feed, sent), stream.finish()]) == "Ann Lee, ann@x.org, 4111 1111 1111 1111"


class Cloud:
    """A chat API that keeps what it gets."""

    def __init__(self) -> None:
        self.got: list[bytes] = []

    def ask(self, payload: bytes) -> None:
        self.got.append(payload)


def test_the_ledger_says_what_leaves_by_way_sandwich() -> None:
    ledger, cloud = EgressLedger(None), Cloud()
    sent = redactor_here().request(random.Random(0)).redact_messages([{"role": "user", "content": "to ann@x.org"}])
    entry = sent.record(ledger, "chat")
    cloud.ask(sent.payload)
    assert (entry.way, entry.kind, entry.bytes) == ("sandwich", "chat", len(cloud.got[0]))
    text = redactor_here().request(random.Random(0)).redact("é ann@x.org")
    assert text.record(ledger).bytes == len(text.payload) == len(text.text.encode())
    assert ledger.totals()["request"]["count"] == 1


def test_a_failing_detector_sends_nothing() -> None:
    cloud, ledger = Cloud(), EgressLedger(None)
    request = Redactor(finder=HereFinder({"broken": Failing()})).request(random.Random(0))
    with pytest.raises(RedactionError):
        sent = request.redact("private")
        sent.record(ledger)
        cloud.ask(sent.payload)
    assert cloud.got == [] and ledger.totals() == {}


def test_a_time_out_sends_nothing_and_the_next_request_is_redacted() -> None:
    cloud = Cloud()
    settings = DetectorSettings(detectors=("email",), own=("sandwich_detectors:Hanging",))
    with Redactor(settings, timeout_s=1.0) as redactor:
        request = redactor.request(random.Random(0))
        with pytest.raises(RedactionError, match="took longer"):
            cloud.ask(request.redact("hang: ann@x.org").payload)
        assert cloud.got == []
        redactor._finder._timeout_s = 60.0  # type: ignore[attr-defined]  # slow machines; only the first was to run out
        assert request.redact("ann@x.org").counts == {"EMAIL": 1}


def test_a_text_that_is_too_long_is_refused_before_anything_looks_at_it() -> None:
    class Never:
        def find(self, passages: Sequence[Passage]) -> list[list[Finding]]:
            raise AssertionError

        def close(self) -> None: ...

    request = Redactor(finder=Never(), max_chars=10).request()
    with pytest.raises(InputError, match="has 11 characters, expected at most 10"):
        request.redact("x" * 11)
    with pytest.raises(InputError, match="has 12 characters"):
        request.redact_json(["x" * 6, "y" * 6])


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ({1: "a"}, "type int, expected str"),
        ([b"a"], "type bytes is no JSON"),
        ({"a": object()}, "type object is no JSON"),
    ],
)
def test_what_is_no_json_is_refused(value: Any, words: str) -> None:
    with pytest.raises(InputError, match=words):
        redactor_here().request().redact_json(value)


def test_a_value_that_is_too_deep_is_refused() -> None:
    value: Any = "ann@x.org"
    for _ in range(200):
        value = [value]
    with pytest.raises(InputError, match="deeper than 100"):
        redactor_here().request().redact_json(value)
    with pytest.raises(InputError, match="deeper than 100"):
        redactor_here().request().restore_json(value)


def test_settings_that_contradict_are_refused() -> None:
    with pytest.raises(InputError, match="both given"):
        Redactor(DetectorSettings(), finder=HereFinder({}))
    with pytest.raises(InputError, match="max_chars is 0"):
        Redactor(max_chars=0)
    with pytest.raises(InputError, match="style is"):
        Redactor(style="nice")  # type: ignore[arg-type]


def test_redaction_needs_no_torch_and_nothing_outside_of_the_standard_library() -> None:
    code = (
        "import sys; before = set(sys.modules); import cotune.sandwich.redact, cotune.sandwich.detector_worker; "
        "new = {name.split('.')[0] for name in set(sys.modules) - before}; "
        "print(*sorted(new - set(sys.stdlib_module_names)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.split() == ["cotune"]

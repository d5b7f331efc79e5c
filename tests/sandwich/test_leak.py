"""Leaks, counted by hand."""

from __future__ import annotations

import json

import pytest
from redactors import redactor_here
from scripted_clouds import MemoryCloud

from cotune.errors import InputError
from cotune.sandwich.cloud_gate import CloudGate
from cotune.sandwich.leak import invert, measure_leaks, over_redaction


def test_leaks_by_hand() -> None:
    units = [["Ann Lee", "4711"], ["Bob"], ["12 Long Green Old Road"]]
    sent = ["Dear ANN\u00a0 LEE", "nothing", "at Long Green Old Road, no 12"]
    found = measure_leaks(units, sent)
    assert found.leaked == (("Ann Lee",), (), ())
    assert found.to_json() == {
        "units": 4,
        "requests": 3,
        "leak_rate": 1 / 4,
        "leak_fuzzy": 2 / 4,
        "any_leak": 1 / 3,
        "leak_rate_own": 1 / 4,
        "leak_fuzzy_own": 2 / 4,
        "any_leak_own": 1 / 3,
        "leak_words": 1 / 4,
    }
    assert "Ann" not in repr(found)


@pytest.mark.parametrize("written", ["a\u200bnn@x.org", "ANN@X.ORG", "\uff41nn@x.org", "a nn@x.org"])
def test_disguises_do_not_hide_a_leak_also_inside_json(written: str) -> None:
    payload = json.dumps({"messages": [{"content": f'she said "{written}"'}]})
    assert measure_leaks([["ann@x.org"]], [payload]).num_leaked == 1


def test_words_far_apart_are_no_fuzzy_leak() -> None:
    assert measure_leaks([["Long Green Road"]], ["long " + "word " * 9 + "green road"]).num_fuzzy == 0


def test_an_empty_unit_is_refused() -> None:
    with pytest.raises(InputError, match="unit is empty"):
        measure_leaks([[" "]], ["x"])


def test_redaction_leaves_no_leak_and_says_what_it_cost() -> None:
    with redactor_here() as redactor:
        sent = redactor.request().redact("Ann Lee owns the car at 192.0.2.7").text
    assert measure_leaks([["Ann Lee", "192.0.2.7"]], [sent]).num_leaked == 0
    assert over_redaction("Ann Lee owns the car at 192.0.2.7", ["Ann Lee"], sent) == pytest.approx(4 / 8)


def test_an_attacker_is_right_where_its_first_guess_is() -> None:
    with redactor_here() as redactor:
        request = redactor.request()
        sent = request.redact("Ann Lee wrote to ann@example.org").text
        person, mail = (entry.placeholder for entry in request.placeholders.entries)

    attacker = MemoryCloud(lambda text: f"{person} = ann  lee\n{mail.lower()} = bob@example.org\nnonsense")
    found = invert(CloudGate(attacker), [(sent, request)], model="m")
    assert (found.num_values, found.num_right, found.top1) == (2, 1, 0.5)
    assert "Ann" not in attacker.requests[0].payload.decode().split("Somebody")[1]


def test_an_attacker_is_not_asked_where_nothing_was_replaced() -> None:
    cloud = MemoryCloud()
    with redactor_here() as redactor:
        request = redactor.request()
        found = invert(CloudGate(cloud), [(request.redact("Hello!").text, request)], model="m")
    assert (found.num_values, found.top1, cloud.requests) == (0, 0, [])


TOOL = 'Reset(user, new_password): "sets the new pass word of Ann"'


@pytest.mark.parametrize(
    ("said", "num_own"), [("reset it", 0), ("reset it to newpass", 1), ("to NEW PASS", 1), ("(user, new_pass", 0)]
)
def test_what_is_public_is_told_apart_from_what_the_user_sent(said: str, num_own: int) -> None:
    """`newpass` stands in new_password as its letters do; the strict count takes it, whoever asks."""
    payload = json.dumps({"messages": [{"content": f"APIs: {TOOL}\n{said}"}]})
    found = measure_leaks([["newpass"]], [payload], [TOOL])
    assert found.num_leaked == 1 == measure_leaks([["newpass"]], [payload]).num_leaked
    assert sum(map(len, found.leaked_own)) == num_own and found.to_json()["any_leak_own"] == num_own
    assert measure_leaks([["newpass"]], [payload]).leaked_own == (("newpass",),)


@pytest.mark.parametrize(
    ("said", "num_words"),
    [("your new password?", 0), ("my newpassword", 0), ("it is NEWPASS.", 1), ("new_pass, newpass_2, n ewpass", 0)],
)
def test_chance_is_told_apart_from_words_of_their_own(said: str, num_words: int) -> None:
    found = measure_leaks([["newpass"]], [json.dumps({"content": said})])
    assert found.num_leaked == 1 and sum(map(len, found.leaked_words)) == num_words


def test_a_piece_of_a_public_text_hides_nothing() -> None:
    found = measure_leaks([["Ann"], ["the new"]], ["Ann sets the new word"], [TOOL])
    assert found.leaked_own == found.leaked == (("Ann",), ("the new",)) and found.num_fuzzy_own == found.num_fuzzy

"""The arithmetic of the redaction benchmark by hand, and API-Bank where it is at hand."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
from redaction import (
    copyable_arguments,
    fold,
    gold_units,
    measure_api_bank,
    measure_plain,
    measure_planted,
    read,
    stands_in,
)

from cotune.sandwich.detect import HereFinder
from cotune.sandwich.detectors.email import EmailDetector
from cotune.sandwich.redact import Redacted, Redactor, Replacement

ROW: dict[str, Any] = {
    "instruction": "User: I am John, id 7788, mail john@x.org, pass: hush7.",
    "calls": [
        "API-Request: [Open(username='John', user_id='7788', email='John@x.org', password='hush7', city='Rome')]"
    ],
    "tools": [{"name": "Open", "input_parameters": {"user_id": {"description": "The user"}}}],
}
API_BANK = Path(__file__).parents[3] / "shared" / "data" / "api_bank" / "test.jsonl"


def only_mail() -> Redactor:
    return Redactor(finder=HereFinder({"email": EmailDetector()}))


def test_gold_units_are_the_personal_arguments_that_stand_in_the_request() -> None:
    assert gold_units(ROW) == {"john": "name", "7788": "id", "john@x.org": "mail", "hush7": "secret"}
    assert gold_units({**ROW, "instruction": "Johnny, 77881"}) == {}
    assert fold(" A\n b ") == "a b" and stands_in("a b", "x a b.") and not stands_in("a", "ab")


def test_leaks_by_hand() -> None:
    rules = measure_api_bank([ROW], with_dictionary=False, with_ids=False)
    # The mail and the password are found; the name and the id are not, though the name stands in the mail too.
    assert rules["units"] == 4 and rules["leak_rate"] == 0.5 and rules["any_leak"] == 1.0
    assert rules["leak_rate_by_kind"] == {"id": 1.0, "mail": 0.0, "name": 1.0, "secret": 0.0}
    assert (rules["replaced"], rules["replaced_of_gold"]) == (2, 1.0)
    assert rules["leaked"] == 2 and rules["copyable"] == 1.0 and rules["over_redaction"] == 0.0
    assert measure_api_bank([ROW], with_dictionary=True, with_ids=True)["leak_rate"] == 0.0


def test_strict_leaves_nothing_that_is_not_common_and_what_stays_can_be_copied() -> None:
    strict = measure_api_bank([ROW], with_dictionary=False, with_ids=False, allow_list=("i", "am", "id", "mail"))
    assert strict["leaked"] == 0 and strict["strict"]
    # Of the words beside the units, i, am, id and mail stay, and user as the tool's; pass is taken along.
    assert strict["over_redaction"] == pytest.approx(1 / 6) and strict["copyable"] == 1.0


def test_a_placeholder_across_the_end_of_a_value_cannot_be_copied() -> None:
    row = {"instruction": "Meet Ann Lee-Roe in Rome", "calls": ["[Meet(who='Ann Lee', where='Rome', when='now')]"]}
    sent = Redacted("x", (Replacement("TERM", 9, 16, 0, 1),))
    assert list(copyable_arguments(row, sent)) == [False, True]


def test_recall_and_precision_by_hand() -> None:
    rows = measure_planted(["We met on Monday."] * 26, only_mail(), random.Random(0))
    recall = {(row["kind"], row["written"]): row["recall"] for row in rows}
    assert recall["EMAIL", "plain"] == recall["EMAIL", "full width"] == 1.0 and recall["CARD", "plain"] == 0.0
    num_mails = sum(row["planted"] for row in rows if row["kind"] == "EMAIL")
    assert rows[-1]["recall"] == num_mails / 26 and rows[-1]["precision"] == 1.0


def test_mistakes_by_hand() -> None:
    plain = measure_plain(["a" * 991 + " bob@x.org"], only_mail())
    assert plain == {"kilobytes": 1.001, "mistakes": {"EMAIL": 1}, "per_100_kB": pytest.approx(99.9, abs=0.01)}


@pytest.mark.skipif(not API_BANK.is_file(), reason="API-Bank is not at hand (../shared/data)")
def test_little_of_api_bank_leaks_with_a_dictionary_and_ids() -> None:
    rows = read(API_BANK)[::10]
    few = measure_api_bank(rows, with_dictionary=True, with_ids=True)
    assert few["units"] > 20 and few["leak_rate"] < 0.1
    assert few["leak_rate_by_kind"].get("name") == 0.0
    assert measure_api_bank(rows, with_dictionary=False, with_ids=False)["leak_rate"] > few["leak_rate"]

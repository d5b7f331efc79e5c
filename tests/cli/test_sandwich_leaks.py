"""`cotune sandwich leaks`: counts by hand, the union of a run, and an attacker that reads nothing but what is sent."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from cotune.ledger import EgressLedger
from cotune.sandwich.scripted_cloud import scripted_server
from cotune.sandwich.sent_log import SentLog

SLOW = ("--detector-timeout", 60)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    rows = [
        {"prompt": "Write to ann@example.org, says Ann Lee.", "target": "x", "private": ["ann@example.org", "Ann Lee"]},
        {"prompt": "What is a lake?", "target": "x", "private": []},
    ]
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_what_would_be_sent_is_counted_and_nothing_is_sent(run: Callable[..., Any], data: Path) -> None:
    shown = json.loads(run("sandwich", "leaks", data, "--json", *SLOW).out)
    # The address is found; the name stands in no dictionary.
    assert (shown["units"], shown["requests"], shown["leak_rate"], shown["any_leak"]) == (2, 2, 0.5, 0.5)
    assert shown["inversion"] is None
    (data.parent / "words.txt").write_text("PERSON: Ann Lee\n")
    done = run("sandwich", "leaks", data, "--dictionary", data.parent / "words.txt", *SLOW)
    assert "leak_rate       0.00% of 2" in done.out and "nothing was sent" in done.err
    assert "Ann" not in done.out and "example" not in done.out


def test_the_union_of_a_run_is_looked_at(run: Callable[..., Any], data: Path) -> None:
    with SentLog(data.with_name("sent.jsonl")) as log:
        log.add("d", b'{"content": "ANN  LEE"}')
        log.add("e", b'{"content": "nothing"}')
    shown = json.loads(run("sandwich", "leaks", data, "--sent", data.with_name("sent.jsonl"), "--json", *SLOW).out)
    assert (shown["leak_rate"], shown["leak_fuzzy"]) == (0.5, 0.5)


def test_an_attacker_guesses_from_the_redacted_text_alone(run: Callable[..., Any], data: Path) -> None:
    def guess(body: Mapping[str, Any]) -> str:
        placeholder = re.search(r"<EMAIL_\d+>", body["messages"][-1]["content"])
        assert placeholder is not None
        return f"{placeholder[0]} = ann@example.org"

    ledger = data.with_name("ledger.jsonl")
    with scripted_server(guess) as server:
        words = ["sandwich", "leaks", data, "--attack", server.base_url, "--model", "m", "--ledger", ledger, *SLOW]
        shown = json.loads(run(*words, "--json").out)
        assert shown["inversion"] == {"values": 1, "right": 1, "top1": 1.0}
        assert len(server.bodies) == 1 and b"example.org" not in server.bodies[0]
        assert "100.00% of 1 placeholders" in run(*words).out
        run(*words, "--budget-calls", 0).check_refusal("calls would be", status=1)
    assert [entry.way for entry in EgressLedger.read(ledger)] == ["sandwich", "sandwich"]


def test_what_cannot_be_counted_is_refused(run: Callable[..., Any], data: Path) -> None:
    run("sandwich", "leaks", data, "--attack", "http://127.0.0.1:9/v1").check_refusal("without --model")
    run("sandwich", "leaks", data, "--sent", data.with_name("none"), *SLOW).check_refusal("cannot be read")
    data.write_text('{"prompt": "a", "target": "b"}\n')
    run("sandwich", "leaks", data).check_refusal("names no private value")

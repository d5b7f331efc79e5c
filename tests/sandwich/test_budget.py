"""A budget holds: over threads, over failures, over runs."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cotune.errors import BudgetError, DataError, InputError
from cotune.sandwich.budget import Budget, Purse
from cotune.sandwich.cost import Cost

CALL = Cost(calls=1, tokens_in=10, tokens_out=5, usd=0.01)


@pytest.mark.parametrize(
    ("budget", "named"), [(Budget(calls=2), "calls"), (Budget(tokens=44), "tokens"), (Budget(usd=0.029), "usd")]
)
def test_the_third_request_finds_no_room(budget: Budget, named: str) -> None:
    purse = Purse(budget)
    purse.reserve(CALL)
    purse.settle(purse.reserve(CALL), CALL)
    with pytest.raises(BudgetError, match=f"{named} would be"):
        purse.reserve(CALL)


def test_what_was_not_used_is_free_again() -> None:
    purse = Purse(Budget(tokens=20))
    purse.settle(purse.reserve(CALL), Cost(calls=1, tokens_in=3, tokens_out=2))
    purse.reserve(CALL)
    assert purse.spent == Cost(calls=2, tokens_in=13, tokens_out=7, usd=0.01)


def test_time_is_part_of_the_budget() -> None:
    now = [0.0]
    purse = Purse(Budget(seconds=10), clock=lambda: now[0])
    now[0] = 9.0
    purse.reserve(CALL)
    assert purse.seconds_left == 1.0
    now[0] = 10.0
    with pytest.raises(BudgetError, match="10 seconds"):
        purse.reserve(CALL)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 50), st.booleans()), max_size=30), st.integers(0, 200))
def test_neither_paid_nor_reserved_ever_exceeds_the_budget(requests: list[tuple[int, bool]], limit: int) -> None:
    purse = Purse(Budget(tokens=limit))
    for tokens, answers in requests:
        try:
            ticket = purse.reserve(Cost(calls=1, tokens_in=tokens))
        except BudgetError:
            assert purse.spent.tokens + tokens > limit
            continue
        if answers:
            purse.settle(ticket, Cost(calls=1, tokens_in=tokens // 2))
        assert purse.spent.tokens <= limit


def test_threads_together_get_no_more_than_the_budget() -> None:
    purse, got = Purse(Budget(calls=50)), []

    def work() -> None:
        for _ in range(20):
            try:
                got.append(purse.reserve(CALL))
            except BudgetError:
                return

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(got) == list(range(50))


def test_a_journal_goes_on_and_counts_what_nobody_settled_in_full(tmp_path: Path) -> None:
    journal, now = tmp_path / "journal.jsonl", [0.0]
    with Purse(Budget(calls=3), journal=journal, clock=lambda: now[0]) as purse:
        purse.settle(purse.reserve(CALL), Cost(calls=1, tokens_in=2))
        now[0] = 7.0
        purse.reserve(CALL)  # the answer never came
    again = Purse(Budget(calls=3), journal=journal, clock=lambda: now[0])
    assert again.spent == Cost(calls=1, tokens_in=2) + CALL
    assert again.seconds == 7.0
    again.reserve(CALL)
    with pytest.raises(BudgetError):
        again.reserve(CALL)
    again.close()


def test_a_line_that_was_cut_is_dropped_and_the_file_goes_on(tmp_path: Path) -> None:
    journal = tmp_path / "journal.jsonl"
    with Purse(journal=journal) as purse:
        purse.reserve(CALL)
    whole = journal.read_bytes()
    journal.write_bytes(whole + b'{"ticket": 1, "mo')
    with Purse(journal=journal) as purse:
        purse.reserve(CALL)
        assert purse.spent.calls == 2
    assert [json.loads(line)["ticket"] for line in journal.read_text().splitlines()] == [0, 1]


@pytest.mark.parametrize("line", ["{}", "nonsense", '{"ticket": 5, "paid": {}, "seconds": 0}'])
def test_a_damaged_journal_is_refused_by_its_line(tmp_path: Path, line: str) -> None:
    (tmp_path / "journal").write_text(line + "\n")
    with pytest.raises(DataError, match="line 1"):
        Purse(journal=tmp_path / "journal")


def test_a_limit_below_zero_is_refused() -> None:
    with pytest.raises(InputError, match="usd of the budget"):
        Budget(usd=-1)

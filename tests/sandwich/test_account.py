"""The account: operations by hand, percentiles, words."""

from __future__ import annotations

from dataclasses import replace

from cotune.sandwich.account import Account, peak_memory_bytes, percentiles
from cotune.sandwich.cost import Cost


def test_operations_are_two_and_six_for_each_parameter_and_token() -> None:
    account = Account(num_edge_parameters=1000)
    account.edge(forward_tokens=7, backward_tokens=3)
    assert account.taken().edge_flops == 1000 * (2 * 7 + 6 * 3)


def test_all_of_it_is_in_json_and_in_words() -> None:
    account = Account()
    account.paid(Cost(calls=2, tokens_in=30, usd=0.25))
    account.count(cached=1, bytes_out=1234)
    with account.stage("merge"):
        pass
    shown = account.taken().to_json()
    assert shown["calls"] == 2 and shown["usd"] == 0.25 and shown["bytes_out"] == 1234 and shown["cached"] == 1
    assert shown["stages"]["merge"].keys() == {"p50", "p95"} and shown["peak_memory_bytes"] > 1 << 20
    assert "2 calls" in account.taken().to_text() and "merge" in account.taken().to_text()


def test_the_break_even_line_is_the_whole_requests_time() -> None:
    account = Account()
    assert "break-even" not in account.taken().to_text()
    taken = replace(account.taken(), stage_seconds={"merge": (9.0,), "whole": (0.1, 0.2, 0.3)})
    assert "takes more than 200 ms (median), 290 ms (95 %)" in taken.to_text()


def test_percentiles_by_hand() -> None:
    assert percentiles([*range(101)]) == {"p50": 50.0, "p95": 95.0}


def test_memory_never_falls() -> None:
    before = peak_memory_bytes()
    assert peak_memory_bytes() >= before > 0


def test_models_on_the_edge_count_by_their_own_size() -> None:
    account = Account(num_edge_parameters=1000)
    account.edge(forward_tokens=7)
    account.edge(forward_tokens=2, backward_tokens=1, num_parameters=10)
    taken = account.taken()
    assert taken.edge_flops == 2 * 1000 * 7 + 10 * (2 * 2 + 6) and taken.edge_forward_tokens == 9

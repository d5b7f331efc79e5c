"""What a token costs by schedule, and what that makes a stream do."""

from __future__ import annotations

import pytest

from cotune.generation.controller import (
    Outlook,
    best_draft_tokens,
    blocking_cost_s,
    drafted_cost_s,
    expected_run,
    optimistic_cost_s,
)


def test_costs_by_hand() -> None:
    assert blocking_cost_s(step_s=0.02, round_trip_s=0.05, trips=0.5) == pytest.approx(0.045)
    assert optimistic_cost_s(step_s=0.02, round_trip_s=0.05, disagree=0.2) == pytest.approx(0.03)
    # 1 + 1/2 + 1/4 tokens for 70 ms.
    assert drafted_cost_s(step_s=0.02, round_trip_s=0.05, draft_kept=0.5, draft_tokens=2) == pytest.approx(0.04)
    assert expected_run(0.5, 3) == 0.875
    assert expected_run(0.9, 0) == 0.0


@pytest.mark.parametrize(("kept", "tokens"), [(0.0, 0), (0.1, 0), (0.11, 1), (0.5, 3), (0.9, 21), (1.0, 32)])
def test_drafts_are_as_long_as_they_are_good(kept: float, tokens: int) -> None:
    assert best_draft_tokens(draft_kept=kept, most=32) == tokens


def outlook(**changes: float) -> Outlook:
    return Outlook(**{"step_s": 0.02, "round_trip_s": 0.05, "disagree": 0.2, **changes})


def test_running_ahead_by_hand() -> None:
    # Three steps; the first token is worth 30 ms, then 0.8 and 0.64 of it; half a step is lost.
    assert outlook().running_ahead_s(1.0) == pytest.approx(0.03 * 2.44 - 0.01)
    # One step, worth 1.1 c if it is right, and 0.5 c lost.
    assert outlook(round_trip_s=0.01).running_ahead_s(0.8) == pytest.approx(0.8 * 0.022 - 0.01)


def test_it_waits_where_the_answer_is_near_or_the_token_doubtful() -> None:
    assert outlook().running_ahead_s(0.8) > 0
    assert outlook(round_trip_s=0.001).running_ahead_s(0.8) < 0
    assert outlook(disagree=0.9).running_ahead_s(0.1) < 0


def test_good_drafts_make_single_steps_worth_less() -> None:
    without, with_drafts = outlook(), outlook(draft_kept=0.9)
    assert with_drafts.token_s < without.token_s
    assert with_drafts.running_ahead_s(0.4) < 0 < without.running_ahead_s(0.4)


def test_a_draft_against_the_base_token() -> None:
    assert outlook().prefers_draft(1.0, drafted=0.6, base=0.3, num_free=3)
    assert not outlook().prefers_draft(1.0, drafted=0.05, base=0.9, num_free=3)
    # What has been computed for nothing already tips the balance.
    near = outlook(round_trip_s=0.02, draft_kept=0.8)
    assert near.prefers_draft(1.0, drafted=0.3, base=0.6, num_free=8)
    assert not outlook().prefers_draft(1.0, drafted=0.1, base=0.8, num_free=0)

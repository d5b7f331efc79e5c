"""Which way is the fastest, from what was measured: the cost of a token by schedule, and the choice between them.

Symbols: c is a cloud step, R a round trip with the device's time, q the share of tokens that the device changes, a the
share of drafted tokens that hold, M the share of tokens that are waited for. Times in seconds.
"""

from __future__ import annotations


def blocking_cost_s(*, step_s: float, round_trip_s: float, trips: float = 1.0) -> float:
    """c + M R, equations 3 to 5 of SPA (arXiv 2403.07088): every trip is waited for."""
    return step_s + trips * round_trip_s


def optimistic_cost_s(*, step_s: float, round_trip_s: float, disagree: float) -> float:
    """c + q R: only a changed token costs a trip."""
    return step_s + disagree * round_trip_s


def drafted_cost_s(*, step_s: float, round_trip_s: float, draft_kept: float, draft_tokens: int) -> float:
    """(c + R) / E with E = 1 + a + ... + a^k tokens from one pass over k drafted ones.

    Example:
        >>> drafted_cost_s(step_s=0.02, round_trip_s=0.05, draft_kept=0.0, draft_tokens=4)
        0.07
    """
    expected = sum(draft_kept**i for i in range(draft_tokens + 1))
    return (step_s + round_trip_s) / expected


def best_draft_tokens(*, draft_kept: float, most: int, token_cost: float = 0.05) -> int:
    """How many tokens to draft: as long as the next one is likelier to hold than it costs of a step.

    Args:
        draft_kept: a.
        most: the longest draft.
        token_cost: what one more token adds to a pass, in steps.

    Example:
        >>> best_draft_tokens(draft_kept=0.5, most=8), best_draft_tokens(draft_kept=0.9, most=8)
        (4, 8)
    """
    chance, k = draft_kept, 1
    while k < most and chance * draft_kept > token_cost:
        chance *= draft_kept
        k += 1
    return k


def prefers_drafts(*, disagree: float, draft_kept: float) -> bool:
    """Whether waiting for a draft beats running ahead with base tokens: drafts hold more often than these do."""
    return draft_kept > 1.0 - disagree

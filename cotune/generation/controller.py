"""Which way is the fastest, from what was measured: the cost of a token by schedule, and the choice between them.

Symbols: c is a cloud step, R a round trip with the device's time, q the share of tokens that the device changes, a the
share of drafted tokens that hold, M the share of tokens that are waited for. Times in seconds.
"""

from __future__ import annotations

import math
from dataclasses import dataclass


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


def best_draft_tokens(*, draft_kept: float, most: int, token_cost: float = 0.1) -> int:
    """How many tokens to draft: as long as the next one is likelier to hold than it costs of a step; maybe none.

    Args:
        draft_kept: a.
        most: the longest draft.
        token_cost: what one more token adds to a pass, in steps.

    Example:
        >>> best_draft_tokens(draft_kept=0.5, most=8), best_draft_tokens(draft_kept=0.9, most=8)
        (3, 8)
    """
    chance, k = 1.0, 0
    while k < most and chance * draft_kept > token_cost:
        chance *= draft_kept
        k += 1
    return k


def expected_run(share: float, most: int) -> float:
    """How many tokens in a row are right, of `most`, where each is with chance `share`: share + share^2 + ..."""
    return sum(share**i for i in range(1, most + 1))


def branches_pay(*, kept: float, num_branches: int, row_cost: float = 0.1) -> bool:
    """Whether to go on with several tokens where the device is waited for, in rows that nobody else wants.

    In a round trip of n = R / c steps the branches save the stall R where one of them is right, and each adds a row
    to n passes: (kept) R against num_branches n row_cost c.

    Args:
        kept: h_b, how often one of the branches has the right token.
        num_branches: b.
        row_cost: what one more row adds to a pass, in steps.

    Example:
        >>> branches_pay(kept=0.8, num_branches=4), branches_pay(kept=0.3, num_branches=4)
        (True, False)
    """
    return kept > num_branches * row_cost


@dataclass(frozen=True, kw_only=True)
class Outlook:
    """What to go on with while the device is asked, from measured c, R, q and a.

    Attributes:
        step_s, round_trip_s, disagree: c, R and q.
        draft_kept: a; 0 without drafts.
    """

    step_s: float
    round_trip_s: float
    disagree: float
    draft_kept: float = 0.0

    @property
    def token_s(self) -> float:
        """What a token costs by the best way without choices, which is what another one is worth."""
        times = {"step_s": self.step_s, "round_trip_s": self.round_trip_s}
        k = best_draft_tokens(draft_kept=self.draft_kept, most=32)
        drafted_s = drafted_cost_s(**times, draft_kept=self.draft_kept, draft_tokens=k)
        return min(optimistic_cost_s(**times, disagree=self.disagree), drafted_s)

    def running_ahead_s(self, chance: float) -> float:
        """What running ahead with base tokens gains over waiting, seconds; below 0 it loses.

        In a round trip n = ceil(R / c) steps can be begun. The last of them is not over when the answer comes, and
        holds up the pass that this allows: by c - R on a near network, else by half a step on average. The steps gain
        a token each, up to the first that is wrong, if everything before them is right.

        Args:
            chance: that all tokens which have been assumed so far are right.

        Example:
            >>> near = Outlook(step_s=0.02, round_trip_s=0.001, disagree=0.2)
            >>> far = Outlook(step_s=0.02, round_trip_s=0.05, disagree=0.2)
            >>> [round(outlook.running_ahead_s(1.0), 4) for outlook in (near, far)]
            [0.0012, 0.0632]
        """
        num_steps = math.ceil(self.round_trip_s / self.step_s)
        gained = chance * (1.0 + expected_run(1.0 - self.disagree, num_steps - 1))
        return gained * self.token_s - max(self.step_s - self.round_trip_s, self.step_s / 2.0)

    def prefers_draft(self, chance: float, *, drafted: float, base: float, num_free: int) -> bool:
        """Whether to go on with a drafted token that is not the base token.

        Its successors have been read in the same pass and cost nothing more; those of the base token have to be
        computed while the device is asked.

        Args:
            chance: that all tokens assumed before are right.
            drafted, base: chances of the two.
            num_free: positions that have been computed after this one, from this draft.
        """
        draft_holds, free_s = chance * drafted, 0.0
        if num_free:
            free_s = draft_holds * (1.0 + expected_run(self.draft_kept, num_free - 1)) * self.token_s
            draft_holds *= self.draft_kept ** (num_free - 1) * (1.0 - self.disagree)
        after_draft_s = free_s + max(0.0, self.running_ahead_s(draft_holds))
        return after_draft_s >= self.running_ahead_s(chance * base)

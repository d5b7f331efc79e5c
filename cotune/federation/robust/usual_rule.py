"""The rule that a federation has unless its settings name another: what bears most with so many replies."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cotune.federation.robust.clip_to_median_norm import ClipToMedianNorm
from cotune.federation.robust.leave_out_long import LeaveOutLong
from cotune.federation.robust.mean import Mean
from cotune.federation.robust.rule import RobustRule
from cotune.federation.robust.trimmed_mean import TrimmedMean
from cotune.federation.robust.votes import read_votes

TRIMMED = 0.2
"""Share of the replies that is cut at either end, of those that are not left out for their length."""


def usual_rule(num_replies: int, *, is_pooled: bool = False) -> RobustRule:
    """Far too long replies left out, the others clipped to their median norm, and of these the trimmed mean.

    Where too few are there to trim it is the mean, and nothing is clipped or left out where too few are there for a
    median. What is left out never makes the replies too few for what follows: one of five cannot be, two of ten can.

    Args:
        num_replies: that are asked for, or there.
        is_pooled: each device fills other places (`cotune.federation.algorithms.POOLED`). Then nothing is trimmed: what
            one device alone says of a place would be cut as its largest number, and what is learnt with it. A liar of
            the median norm counts as one device.

    Example:
        >>> usual_rule(5)
        LeaveOutLong(rule=ClipToMedianNorm(rule=TrimmedMean(share=0.2)), times=4.0)
        >>> usual_rule(4), usual_rule(2)
        (LeaveOutLong(rule=ClipToMedianNorm(rule=Mean()), times=4.0), Mean())
        >>> usual_rule(5, is_pooled=True) == usual_rule(4)
        True
    """
    trimmed = () if is_pooled else (TrimmedMean(share=TRIMMED),)
    # Of two lengths the median is no judge.
    for combined in (*trimmed, Mean()):
        rule = LeaveOutLong(rule=ClipToMedianNorm(rule=combined))
        if num_replies >= rule.min_replies:
            return rule
    return Mean()


@dataclass(frozen=True, kw_only=True)
class UsualRule:
    """`usual_rule` of the replies that it is shown, for algorithms that combine parts of a round's replies.

    A class of devices, or half of the replies, is smaller than the round, and its size is known only when they are
    there. In parts of fewer than five a liar counts, but for a far too long one of four.

    Attributes:
        is_pooled: as for `usual_rule`.

    Example:
        >>> updates = np.array([[1.0], [2.0], [2.0], [2.0], [1e6]], dtype=np.float32)
        >>> UsualRule()(updates, np.ones(5)), UsualRule()(updates[:2], np.ones(2))
        (array([2.], dtype=float32), array([1.5], dtype=float32))
    """

    is_pooled: bool = False

    @property
    def min_replies(self) -> int:
        """1."""
        return 1

    def max_byzantine(self, num_replies: int) -> int:
        """As many as the rule for so many replies bears."""
        return usual_rule(num_replies, is_pooled=self.is_pooled).max_byzantine(num_replies)

    def __call__(
        self,
        updates: NDArray[np.float32],
        weights: NDArray[np.float64],
        /,
        *,
        scales: NDArray[np.float64] | None = None,
    ) -> NDArray[np.float32]:
        """What the rule for so many replies makes of them; see `RobustRule`."""
        votes = read_votes(updates, weights, scales=scales, min_replies=self.min_replies, reader="the usual rule")
        return usual_rule(votes.num, is_pooled=self.is_pooled)(updates, weights, scales=scales)

"""Updates far longer than the median one are left out; then another rule combines the others."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cotune.errors import InputError
from cotune.federation.robust.rule import RobustRule
from cotune.federation.robust.votes import read_votes


@dataclass(frozen=True, kw_only=True)
class LeaveOutLong:
    """Updates longer than `times` times the median norm are left out, and another rule combines the others.

        left out are those i with ||update_i|| > times * median_j ||update_j||, the longest first,
        as long as the other rule has its min_replies

    A rule that trims pays for each liar twice, also for a gross one: it cuts the liar at one end and an honest device
    at the other, so that what is left leans to one side. Whoever is left out by its length is cut alone.

    Norms are those of devices with a positive weight, one vote each, and the median is of all of them. More than half
    are never left out, and never so many that the other rule would refuse: one liar cannot void a round.

    What an adversary gains by it:

    - A lie just below the threshold is not seen here. It does what it did to the other rule alone, so put one behind
      that bears liars of any length, and clips.
    - With zeros, f liars pull the median down to a lower honest norm. Honest devices that are longer than `times` times
      that one are left out, often those whose texts are least like the others', and the liars are a larger share of
      fewer replies. Hence `max_byzantine`, which counts with the fewest that can be left. Where honest norms are within
      a factor of `times` of each other the median is among them, nobody honest is left out, and the rule bears what the
      other one bears.
    - By something huge a liar gains nothing: it is not there. That holds for just under half of the devices, more than
      most rules bear, as long as the other rule has enough replies without them.

    Nothing is copied: those left out have weight 0 in the other rule. Where nobody is left out, the result is the other
    rule's to the bit.

    Example:
        >>> from cotune.federation.robust.trimmed_mean import TrimmedMean
        >>> updates = np.array([[1.0], [2.0], [3.0], [4.0], [5.0], [-50.0]], dtype=np.float32)
        >>> LeaveOutLong(rule=TrimmedMean(share=0.2))(updates, np.ones(6)), TrimmedMean(share=0.2)(updates, np.ones(6))
        (array([3.], dtype=float32), array([2.5], dtype=float32))
    """

    rule: RobustRule
    """What combines the others."""
    times: float = 4.0
    """How long an update may be, in median norms: 1 or more. Of ten honest devices with texts of four kinds, one kind
    each, the longest update was at 1.0 to 1.2 median norms where weights are sent, and at 1.3 to 2.5 where slopes of
    forward passes are, which are as unlike as the texts' gradients; docs/log.md. 4 is well above these."""

    def __post_init__(self) -> None:
        if not callable(self.rule):
            raise InputError(f"rule is {self.rule!r}, expected a rule; make one with rule_named")
        is_number = isinstance(self.times, int | float) and not isinstance(self.times, bool)
        if not is_number or not 1 <= self.times < math.inf:
            raise InputError(f"times is {self.times!r}, expected a finite number of median norms, 1 or more")

    @property
    def min_replies(self) -> int:
        """3, for a median that one device does not decide, or what the other rule needs."""
        return max(3, self.rule.min_replies)

    def max_byzantine(self, num_replies: int) -> int:
        """As many as the other rule bears, however many are left out, and fewer than half."""
        fewest = max(num_replies - num_replies // 2, min(num_replies, self.min_replies))
        borne = min(self.rule.max_byzantine(num) for num in range(fewest, num_replies + 1))
        return min(max(0, (num_replies - 1) // 2), borne)

    def __call__(
        self,
        updates: NDArray[np.float32],
        weights: NDArray[np.float64],
        /,
        *,
        scales: NDArray[np.float64] | None = None,
    ) -> NDArray[np.float32]:
        """What the other rule makes of those that are not left out; see `RobustRule`."""
        reader = "leave_out_long with its rule"
        votes = read_votes(updates, weights, scales=scales, min_replies=self.min_replies, reader=reader)
        kept = weights.copy()
        kept[votes.rows[too_long(votes.norms(), self.times, most=votes.num - self.min_replies)]] = 0
        return self.rule(updates, kept, scales=scales)


def too_long(norms: NDArray[np.float64], times: float, *, most: int) -> NDArray[np.int64]:
    """Places of the norms above `times` times the median, the longest first, at most so many.

    Example:
        >>> norms = np.array([1.0, 9.0, 2.0, 99.0, 2.0])
        >>> too_long(norms, 4.0, most=2), too_long(norms, 4.0, most=1)
        (array([3, 1]), array([3]))
    """
    longest_first = np.argsort(-norms, kind="stable")
    long = longest_first[norms[longest_first] > times * np.median(norms)]
    return long[:most].astype(np.int64)

"""How sure it is that the chosen prompt is nearly the best one for this adapter: a bound, with the n that it rests on.

With losses in [0, 1] of M prompts on the same n examples, which the search has not seen, and d_j = f_chosen - f_j, with
probability 1 - delta over the draw of the examples, for all j at once:

    Hoeffding (1963)            E d_j <= mean d_j + 2 sqrt(ln(M / delta) / (2 n))
    Maurer and Pontil (2009)    E d_j <= mean d_j + sqrt(2 V_j ln(2 M / delta) / n) + 14 ln(2 M / delta) / (3 (n - 1))

V_j is the sample variance of d_j, whose range is 2. The gap h = max_j E d_j is at most the largest of either row. Small
n give wide bounds: 0.23 for 8 prompts and 200 examples by Hoeffding. It is a statement about examples like these, and
about these M prompts; no other.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass

import numpy as np
from numpy.typing import NDArray

from cotune.errors import InputError


@dataclass(frozen=True, kw_only=True)
class Certificate:
    """The bound.

    Attributes:
        gap: h on the sample: how much worse the chosen prompt is than the best.
        hoeffding, bernstein: upper bounds of the true gap.
        num_examples, num_prompts: n and M.
        delta: how often such a statement may be false.
        tolerance: that was asked for.
    """

    gap: float
    hoeffding: float
    bernstein: float
    num_examples: int
    num_prompts: int
    delta: float
    tolerance: float

    @property
    def bound(self) -> float:
        """The smaller one, 1 at most; each alone holds with probability 1 - delta, both together with 1 - 2 delta."""
        return min(self.hoeffding, self.bernstein, 1.0)

    @property
    def holds(self) -> bool:
        """Whether the bound is within the tolerance."""
        return self.bound <= self.tolerance

    def to_json(self) -> dict[str, float | bool]:
        """All of it, flat."""
        return {**asdict(self), "bound": self.bound, "holds": self.holds}

    def to_text(self) -> str:
        """One sentence with its n."""
        verdict = "certified" if self.holds else "not certified"
        return (
            f"{verdict}: the gap is {self.gap:.4f} on n = {self.num_examples} examples, at most {self.bound:.4f} in "
            f"truth with probability {1 - self.delta:.0%} (asked for: {self.tolerance:g}; {self.num_prompts} prompts)"
        )


def certify(losses: NDArray[np.float64], chosen: int, *, tolerance: float, delta: float = 0.05) -> Certificate:
    """Bound the gap of one of M prompts.

    Args:
        losses: float64 (prompts, examples), in [0, 1].
        chosen: its row.
        tolerance: the largest gap that is fine.
        delta: how often the bound may be false.

    Raises:
        InputError: fewer than 2 examples, losses outside of [0, 1], or an impossible `delta`.

    Example:
        >>> losses = np.zeros((8, 200))
        >>> round(certify(losses, 0, tolerance=0.3).hoeffding, 3)
        0.225
    """
    if losses.ndim != 2 or losses.shape[1] < 2:
        raise InputError(f"losses has shape {losses.shape}, expected (prompts, examples) with at least 2 examples")
    if not ((losses >= 0) & (losses <= 1)).all():
        raise InputError("a loss is outside of 0 to 1, for which no bound is known here; scale the losses")
    if not 0 < delta < 1:
        raise InputError(f"delta is {delta}, expected a share strictly between 0 and 1, such as 0.05")
    num_prompts, n = losses.shape
    excess = losses[chosen] - losses  # (prompts, examples); 0 in the chosen row
    means, variances = excess.mean(1), excess.var(1, ddof=1)
    gap = float(means.max())
    hoeffding = gap + 2 * math.sqrt(math.log(num_prompts / delta) / (2 * n))
    log_term = math.log(2 * num_prompts / delta)
    bernstein = float((means + np.sqrt(2 * variances * log_term / n)).max()) + 14 * log_term / (3 * (n - 1))
    return Certificate(
        gap=gap,
        hoeffding=hoeffding,
        bernstein=bernstein,
        num_examples=n,
        num_prompts=num_prompts,
        delta=delta,
        tolerance=tolerance,
    )

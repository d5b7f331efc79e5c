"""How well two Gaussian distributions can be told apart, as epsilon and delta.

Differential privacy compares what is released with and without one device. Where both are Gaussian, P and Q, the exact
answer is known (Dwork and Roth, 2014, for the terms; Balle and Wang, arXiv 1805.06530, for equal variances):

    delta(epsilon) = max over both orders of  P(S) - exp(epsilon) Q(S),    S = {x: log p(x) / q(x) > epsilon}

The log ratio is a parabola, or a line where the variances are equal, so S is an interval, what lies outside of one, or
a half-line. Probabilities are kept as logarithms, so that an epsilon in the thousands is as good as a small one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from cotune.errors import InputError
from cotune.federation.number_ranges import check_at_least, check_positive

# Of epsilon, relative and absolute; the upper end is taken, so it stays a bound.
_TOLERANCE = 1e-10
# Below it erfc loses digits and a series takes over.
_FAR = -25.0


@dataclass(frozen=True, kw_only=True)
class Gaussian:
    """A normal distribution of one number."""

    mean: float
    """Its centre."""
    std: float
    """Its standard deviation, above 0."""

    def __post_init__(self) -> None:
        if not math.isfinite(self.mean):
            raise InputError(f"mean is {self.mean}, expected a finite number")
        check_positive(std=self.std)


def delta_between(first: Gaussian, second: Gaussian, epsilon: float) -> float:
    """The smallest delta for which the two are (epsilon, delta)-indistinguishable, in both orders.

    Args:
        first, second: the distributions.
        epsilon: 0 or more.

    Raises:
        InputError: a negative epsilon.

    Example:
        >>> round(delta_between(Gaussian(mean=0, std=1), Gaussian(mean=1, std=1), 0.0), 4)  # 2 Phi(1/2) - 1
        0.3829
    """
    check_at_least(0, epsilon=epsilon)
    return max(_one_sided_delta(first, second, epsilon), _one_sided_delta(second, first, epsilon))


def epsilon_between(first: Gaussian, second: Gaussian, delta: float) -> float:
    """The smallest epsilon for which the two are (epsilon, delta)-indistinguishable, in both orders.

    Args:
        first, second: the distributions.
        delta: above 0, below 1.

    Raises:
        InputError: an impossible delta.

    Example:
        >>> round(epsilon_between(Gaussian(mean=0, std=1), Gaussian(mean=1, std=1), 1e-5), 2)
        4.38
    """
    if not 0 < delta < 1:
        raise InputError(f"delta is {delta}, expected above 0 and below 1")
    if delta_between(first, second, 0.0) <= delta:
        return 0.0
    low, high = 0.0, 1.0
    while delta_between(first, second, high) > delta:
        low, high = high, 2 * high
    while high - low > _TOLERANCE * max(1.0, high):
        middle = (low + high) / 2
        low, high = (middle, high) if delta_between(first, second, middle) > delta else (low, middle)
    return high


def _one_sided_delta(first: Gaussian, second: Gaussian, epsilon: float) -> float:
    """P(S) - exp(epsilon) Q(S) for P = first; all numbers in units of its standard deviation around its mean."""
    shift, width = (second.mean - first.mean) / first.std, second.std / first.std
    # log p/q - epsilon = a x^2 + b x + c
    a = (1 / width**2 - 1) / 2
    b = -shift / width**2
    c = (shift / width) ** 2 / 2 + math.log(width) - epsilon
    if a == 0:
        if b == 0:
            return 0.0
        pieces = [(-c / b, math.inf)] if b > 0 else [(-math.inf, -c / b)]
    else:
        discriminant = b * b - 4 * a * c
        if discriminant <= 0:  # nowhere, or everywhere: then Q(S) = P(S) and nothing is gained
            return 0.0
        # The root without cancellation first; the other from the product of both.
        far = -(b + math.copysign(math.sqrt(discriminant), b)) / 2
        low, high = sorted((far / a, c / far))
        pieces = [(low, high)] if a < 0 else [(-math.inf, low), (high, math.inf)]
    delta = 0.0
    for low, high in pieces:
        log_first = _log_probability(low, high)
        log_second = _log_probability((low - shift) / width, (high - shift) / width)
        delta += math.exp(log_first) - math.exp(min(log_first, epsilon + log_second))
    return delta


def _log_probability(low: float, high: float) -> float:
    """log of the standard normal probability of low..high."""
    if low > 0:
        low, high = -high, -low
    if high > 0:
        outside = math.exp(_log_cdf(low)) + math.exp(_log_cdf(-high))
        return math.log1p(-outside) if outside < 1 else -math.inf
    log_low, log_high = _log_cdf(low), _log_cdf(high)
    ratio = 0.0 if log_low == -math.inf else math.exp(log_low - log_high)
    return log_high + math.log1p(-ratio) if ratio < 1 else -math.inf


def _log_cdf(x: float) -> float:
    """log Phi(x)."""
    if x == -math.inf:
        return -math.inf
    if x > _FAR:
        return math.log(0.5 * math.erfc(-x / math.sqrt(2)))
    inverse = 1 / (x * x)
    series = math.log1p(-inverse * (1 - 3 * inverse * (1 - 5 * inverse)))
    return -x * x / 2 - math.log(-x * math.sqrt(2 * math.pi)) + series

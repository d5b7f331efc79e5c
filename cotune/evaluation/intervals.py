"""How sure a mean is: percentile bootstrap intervals from a seed. NumPy only."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from cotune.errors import InputError

_DRAWS_AT_ONCE = 1 << 20  # bounds memory to about 16 MB whatever the number of values


def bootstrap_interval(
    values: Sequence[float] | NDArray[np.float64],
    seed: int,
    level: float = 0.95,
    *,
    num_resamples: int = 2000,
) -> tuple[float, float]:
    """Interval that holds the mean of `values` with confidence `level`: the percentile bootstrap.

    Efron (1979): draw as many values with replacement as there are, take their mean, repeat; the interval
    runs from the (1 - level)/2 to the (1 + level)/2 quantile of those means.

    Args:
        values: one finite score for each example, at least one.
        seed: the same seed and values give the same interval.
        level: confidence, strictly between 0 and 1.
        num_resamples: how many means to draw.

    Returns:
        (low, high). One value alone gives (value, value), which says nothing about its spread.

    Raises:
        InputError: no values, a value that is not finite, or a bad `level` or `num_resamples`.

    Example:
        >>> bootstrap_interval([0.0, 1.0], seed=0)
        (0.0, 1.0)
    """
    scores = np.asarray(values, dtype=np.float64)
    if scores.ndim != 1 or scores.size == 0:
        raise InputError(f"values has shape {scores.shape}, expected (examples,) with at least one example")
    if not np.isfinite(scores).all():
        raise InputError("values holds nan or inf, expected finite scores; look at the examples that gave them")
    if not 0.0 < level < 1.0:
        raise InputError(f"level is {level}, expected a share strictly between 0 and 1, such as 0.95")
    if num_resamples < 1:
        raise InputError(f"num_resamples is {num_resamples}, expected at least 1")
    generator = np.random.default_rng(seed)
    means = np.empty(num_resamples, dtype=np.float64)
    chunk = max(1, _DRAWS_AT_ONCE // scores.size)
    for start in range(0, num_resamples, chunk):
        stop = min(start + chunk, num_resamples)
        drawn = generator.integers(scores.size, size=(stop - start, scores.size))  # (resamples, examples)
        means[start:stop] = scores[drawn].mean(axis=1)
    low, high = np.quantile(means, [(1.0 - level) / 2.0, (1.0 + level) / 2.0])
    return float(low), float(high)


# Quantile 0.975 of Student's t for 1 to 30 degrees of freedom; beyond, the normal distribution's is close enough.
_T_975 = (
    *(12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228),
    *(2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086),
    *(2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042),
)


def student_interval(values: Sequence[float] | NDArray[np.float64]) -> tuple[float, float, float]:
    """Mean of a few repeated measurements and its 95 % interval, after Student (1908).

    For runs with different seeds, where there are too few for a bootstrap.

    Args:
        values: one finite number for each run, at least one.

    Returns:
        (mean, low, high); one value alone gives nan for both ends.

    Raises:
        InputError: no values, or one that is not finite.

    Example:
        >>> [round(x, 3) for x in student_interval([1.0, 2.0, 3.0])]
        [2.0, -0.484, 4.484]
    """
    numbers = np.asarray(values, np.float64)
    if numbers.ndim != 1 or numbers.size == 0 or not np.isfinite(numbers).all():
        raise InputError(f"values is {values!r}, expected at least one number and all of them finite")
    mean = float(numbers.mean())
    if numbers.size == 1:
        return mean, math.nan, math.nan
    quantile = _T_975[numbers.size - 2] if numbers.size - 1 <= len(_T_975) else 1.96
    half = quantile * float(numbers.std(ddof=1)) / math.sqrt(numbers.size)
    return mean, mean - half, mean + half

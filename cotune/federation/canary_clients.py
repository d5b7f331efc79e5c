"""An audit of device privacy in one run: devices that are made up, and how well the result remembers them.

Andrew et al., "One-shot Empirical Privacy Estimation for Federated Learning", arXiv 2302.03098. Beside the real
devices, canary devices take part in the rounds; each always sends the same random unit vector c_j times the clipping
norm C. Afterwards its cosine with what was released is looked at:

    g_j = <c_j, released> / ||released||

For a canary that never took part, g_j is N(0, 1/d) in high dimension. For those that did, a normal distribution is
fitted to the g_j. How well both can be told apart is the empirical epsilon at a delta (section 3). Where every round's
result is released, g_j is the largest of its cosines with each of them, and its distribution without participation is
fitted to fresh canaries that never took part.

What the number is: an estimate, for the updates that this run's aggregation lets through, by one kind of attack. It
is no upper bound, and with few canaries no lower bound either; `epsilon_error` says how far chance may move it, and
chance moves it up more than down: canaries that never took part come to about 0.8 where there are 200 of them, and to
0.3 where there are 1,000, at delta 1e-5. A robust rule throws canaries out as strangers, so the audit belongs to means.
k canaries act on each other as noise: keep k / d far below z^2. Canaries also take part in the real mean; run the audit
on a rehearsal where that matters.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cotune.errors import InputError
from cotune.federation.gaussian_privacy import Gaussian, epsilon_between
from cotune.federation.number_ranges import check_positive
from cotune.federation.robust.votes import BLOCK_BYTES

MAX_NUMBERS = 1 << 30
"""Of all canaries together: 4 GiB in float32."""


def make_canaries(num: int, dim: int, seed: int) -> NDArray[np.float32]:
    """Random directions, independent and each as likely as any other.

    Args:
        num: k, canaries.
        dim: d, numbers of an update.
        seed: 0 or more; whoever builds the federation must not know it, or could spare the canaries.

    Returns:
        float32 (num, dim), rows of norm 1 up to rounding.

    Raises:
        InputError: an impossible number, or too many numbers in all.

    Example:
        >>> canaries = make_canaries(3, 1000, seed=0)
        >>> canaries.shape, bool(np.allclose(np.linalg.norm(canaries, axis=1), 1))
        ((3, 1000), True)
    """
    for name, value, least in (("num", num, 1), ("dim", dim, 2), ("seed", seed, 0)):
        if value < least:
            raise InputError(f"{name} is {value}, expected at least {least}")
    if num * dim > MAX_NUMBERS:
        raise InputError(
            f"num is {num:,} and dim {dim:,}, {num * dim:,} numbers in all, expected at most {MAX_NUMBERS:,}; "
            "take fewer canaries, or audit a shorter update such as that of seed mode"
        )
    generator = np.random.Generator(np.random.Philox(np.random.SeedSequence(seed)))
    canaries = np.empty((num, dim), dtype=np.float32)
    for row in canaries:
        direction = generator.standard_normal(dim)
        row[:] = direction / np.linalg.norm(direction)
    return canaries


def canary_updates(canaries: NDArray[np.float32], clip_norm: float) -> NDArray[np.float32]:
    """What canary devices send in every round in which they take part: C c_j, float32 (num, d).

    Raises:
        InputError: no positive norm.

    Example:
        >>> canary_updates(np.array([[0.0, 1.0]], dtype=np.float32), 2.5)
        array([[0. , 2.5]], dtype=float32)
    """
    check_positive(clip_norm=clip_norm)
    return canaries * np.float32(clip_norm)


@dataclass(frozen=True, kw_only=True)
class CanaryAudit:
    """What the cosines say.

    Attributes:
        num_canaries: k.
        num_rounds: results that were looked at; 1 where it was the final one alone.
        seen: fitted to the cosines of canaries that took part.
        unseen: of canaries that did not.
        delta: as asked.
        epsilon: how well the two can be told apart, both orders.
        epsilon_error: standard error of epsilon, from those of the fits: s / sqrt(k) of a mean, s / sqrt(2 k) of a
            standard deviation.
        epsilon_by_mean: the same from the means alone, as if those that took part were spread as widely as the others.
            Gaussian noise on a sum makes them so, and then this number is moved far less by chance; it does not see
            what another mechanism does to the spread.
    """

    num_canaries: int
    num_rounds: int
    seen: Gaussian
    unseen: Gaussian
    delta: float
    epsilon: float
    epsilon_error: float
    epsilon_by_mean: float

    def summary(self) -> str:
        """One line for people."""
        return (
            f"empirical epsilon {self.epsilon:.2f} (standard error {self.epsilon_error:.2f}; "
            f"{self.epsilon_by_mean:.2f} by the means alone) at delta {self.delta:g}, "
            f"from {self.num_canaries:,} canary devices and {self.num_rounds:,} results"
        )


def audit(
    canaries: NDArray[np.float32],
    released: NDArray[np.floating],
    *,
    unseen: NDArray[np.float32] | None = None,
    delta: float = 1e-5,
) -> CanaryAudit:
    """Estimate epsilon from what was released.

    Args:
        canaries: (k, d), of `make_canaries`, that took part; some hundreds or more, at least 3.
        released: (d,), the final update: the sum of all rounds, or the last state minus the first. Or (rounds, d), the
            update of each round.
        unseen: (any number from 3, d), canaries of another seed that took no part. Needed for several rounds; without
            them N(0, 1/d) is taken.
        delta: as in `UserPrivacyAccount`.

    Raises:
        InputError: wrong shapes, too few canaries, a result that is all zeros or not finite, or an impossible delta.

    Example:
        >>> canaries = make_canaries(100, 2000, seed=1)
        >>> leaks = audit(canaries, canaries.sum(axis=0))  # no noise at all
        >>> keeps = audit(canaries, make_canaries(1, 2000, seed=2)[0])  # knows nothing of them
        >>> leaks.epsilon > 20, keeps.epsilon < 4
        (True, True)
    """
    results = np.atleast_2d(released)
    _check(canaries, results, name="canaries")
    if unseen is None:
        if len(results) > 1:
            raise InputError(
                f"released has {len(results)} rounds and unseen is missing, expected canaries that took no part; make "
                "them with make_canaries and another seed"
            )
        null, num_unseen = Gaussian(mean=0.0, std=1 / math.sqrt(canaries.shape[1])), math.inf
    else:
        _check(unseen, results, name="unseen")
        null, num_unseen = _fit(largest_cosines(unseen, results)), len(unseen)
    seen = _fit(largest_cosines(canaries, results))
    return CanaryAudit(
        num_canaries=len(canaries),
        num_rounds=len(results),
        seen=seen,
        unseen=null,
        delta=delta,
        epsilon=epsilon_between(null, seen, delta),
        epsilon_error=_standard_error(null, num_unseen, seen, len(canaries), delta),
        epsilon_by_mean=epsilon_between(null, Gaussian(mean=seen.mean, std=null.std), delta),
    )


def largest_cosines(vectors: NDArray[np.float32], results: NDArray[np.floating]) -> NDArray[np.float64]:
    """For each vector the largest of its cosines with the results, in float64 and blocks of columns.

    Args:
        vectors: (k, d).
        results: (rounds, d).

    Returns:
        (k,).

    Example:
        >>> axes = np.eye(2, dtype=np.float32)
        >>> largest_cosines(axes, np.array([[3.0, 4.0], [-1.0, 0.0]]))
        array([0.6, 0.8])
    """
    products = np.zeros((len(vectors), len(results)))
    squares_of_vectors, squares_of_results = np.zeros(len(vectors)), np.zeros(len(results))
    width = max(1, BLOCK_BYTES // (8 * (len(vectors) + len(results))))
    for start in range(0, vectors.shape[1], width):
        block = vectors[:, start : start + width].astype(np.float64)
        released = results[:, start : start + width].astype(np.float64)
        products += block @ released.T
        squares_of_vectors += np.einsum("kd,kd->k", block, block)
        squares_of_results += np.einsum("td,td->t", released, released)
    if not (np.isfinite(squares_of_results).all() and (squares_of_results > 0).all()):
        bad = np.flatnonzero(~(np.isfinite(squares_of_results) & (squares_of_results > 0))).tolist()
        raise InputError(f"released is all zeros, nan or inf in rounds {bad[:8]}, expected an update; leave these out")
    cosines: NDArray[np.float64] = products / np.sqrt(np.outer(squares_of_vectors, squares_of_results))
    largest: NDArray[np.float64] = cosines.max(axis=1)
    return largest


def _fit(cosines: NDArray[np.float64]) -> Gaussian:
    std = float(cosines.std(ddof=1))
    if not std > 0:
        raise InputError("all canaries have the same cosine, expected random ones; make them with make_canaries")
    return Gaussian(mean=float(cosines.mean()), std=std)


def _standard_error(null: Gaussian, num_null: float, seen: Gaussian, num_seen: float, delta: float) -> float:
    """First-order propagation: epsilon a standard error up and down in each fitted number, by itself."""
    variance = 0.0
    for name, fitted, num in (("seen", seen, num_seen), ("unseen", null, num_null)):
        for shift, stretch in ((1 / math.sqrt(num), 0.0), (0.0, 1 / math.sqrt(2 * num))):
            ends = []
            for sign in (-1, 1):
                moved = Gaussian(
                    mean=fitted.mean + sign * shift * fitted.std, std=fitted.std * math.exp(sign * stretch)
                )
                pair = (null, moved) if name == "seen" else (moved, seen)
                ends.append(epsilon_between(*pair, delta))
            variance += ((ends[1] - ends[0]) / 2) ** 2
    return math.sqrt(variance)


def _check(vectors: NDArray[np.float32], results: NDArray[np.floating], *, name: str) -> None:
    if vectors.ndim != 2 or len(vectors) < 3:
        raise InputError(f"{name} has shape {vectors.shape}, expected (canaries, d) with at least three canaries")
    if results.ndim != 2 or len(results) < 1 or results.shape[1] != vectors.shape[1]:
        raise InputError(
            f"released has shape {results.shape}, expected ({vectors.shape[1]},) or (rounds, {vectors.shape[1]}) as "
            f"{name} has"
        )
    squares = np.einsum("kd,kd->k", vectors, vectors, dtype=np.float64)
    if not (np.isfinite(squares).all() and (squares > 0).all()):
        raise InputError(
            f"{name} has a row that is zero, nan or inf, expected directions; make them with make_canaries"
        )

"""What a private run has spent: epsilon at a delta, and in plain words what that covers and what not.

A step of DP-SGD (Abadi et al., arXiv 1607.00133) releases a sum of clipped gradients over Poisson-sampled texts with
Gaussian noise of standard deviation sigma C: the subsampled Gaussian mechanism with noise multiplier sigma and rate q.
A step of DP-ZO (Tang et al., arXiv 2401.04343; Zhang et al., arXiv 2310.09639) releases a sum of clipped scalars with
such noise, so the same account holds. Two accountants of Opacus compose T steps, each an upper bound on epsilon:

- RDP: Renyi differential privacy (Mironov et al., arXiv 1908.10530; Balle et al., arXiv 1905.09982 for epsilon);
- PRV: privacy random variables composed by Fourier transform (Gopi et al., arXiv 2106.02848), tighter, up to 0.01.

The smaller of the two is the epsilon that is reported.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cotune.errors import InputError
from cotune.tuning.example_gradients import OPACUS_IS_MISSING

# Above it nothing is protected; PRV would take minutes and overflow.
MAX_PRV_EPSILON = 50.0
MAX_NOISE_MULTIPLIER = 1e4
# Noise found for a target epsilon is at most this share above the least that would do.
NOISE_TOLERANCE = 5e-3
_STEP_DOWN = 0.8
# Beyond Opacus' own orders 1.1 .. 63: for much noise and few steps a higher one gives the smallest epsilon.
_HIGH_ORDERS = (80, 96, 128, 192, 256, 512, 1024)
# Bounds as well, a little wider, without the series that fractional orders sum: twenty times as fast.
_WHOLE_ORDERS = (*range(2, 64), *_HIGH_ORDERS)


@dataclass(frozen=True, kw_only=True)
class PrivacyAccount:
    """A run, as far as its privacy goes.

    Attributes:
        noise_multiplier: sigma, the standard deviation of the noise on the sum, divided by the clipping norm C.
        sample_rate: q, the probability of each text at each step.
        num_steps: T, steps taken.
        delta: the probability that the bound may fail with; far below one divided by the number of texts.
    """

    noise_multiplier: float
    sample_rate: float
    num_steps: int
    delta: float

    def __post_init__(self) -> None:
        if not (math.isfinite(self.noise_multiplier) and self.noise_multiplier > 0):
            raise InputError(f"noise_multiplier is {self.noise_multiplier}, expected a positive number")
        if not 0 < self.sample_rate <= 1:
            raise InputError(f"sample_rate is {self.sample_rate}, expected above 0 and at most 1")
        if self.num_steps < 0:
            raise InputError(f"num_steps is {self.num_steps}, expected 0 or more")
        if not 0 < self.delta < 1:
            raise InputError(f"delta is {self.delta}, expected above 0 and below 1")

    @property
    def epsilon(self) -> float:
        """The smaller bound of the two accountants.

        Example:
            >>> account = PrivacyAccount(noise_multiplier=1.0, sample_rate=0.01, num_steps=1000, delta=1e-5)
            >>> round(account.epsilon, 1)
            1.8
        """
        by_rdp = self.epsilon_rdp()
        return by_rdp if by_rdp > MAX_PRV_EPSILON else min(by_rdp, self.epsilon_prv())

    def epsilon_rdp(self, orders: Sequence[float] | None = None) -> float:
        """Opacus' RDP accountant.

        Args:
            orders: those to choose the best of, above 1; None for its own and higher ones.

        Raises:
            InputError: Opacus is not installed.
        """
        try:
            from opacus.accountants import RDPAccountant
        except ImportError as error:
            raise InputError(OPACUS_IS_MISSING) from error
        asked = [*RDPAccountant.DEFAULT_ALPHAS, *_HIGH_ORDERS] if orders is None else list(orders)
        return self._epsilon(RDPAccountant(), alphas=asked)

    def epsilon_prv(self) -> float:
        """The upper bound of Opacus' PRV accountant; slow, and of no use, where epsilon is large.

        Raises:
            InputError: Opacus is not installed.
        """
        try:
            from opacus.accountants import PRVAccountant
        except ImportError as error:
            raise InputError(OPACUS_IS_MISSING) from error
        try:
            return self._epsilon(PRVAccountant())
        except ValueError:  # delta is too small for its arithmetic
            return math.inf

    def _epsilon(self, accountant: object, **options: object) -> float:
        if self.num_steps == 0:
            return 0.0
        accountant.history = [(self.noise_multiplier, self.sample_rate, self.num_steps)]  # type: ignore[attr-defined]
        get_epsilon: Callable[..., float] = accountant.get_epsilon  # type: ignore[attr-defined]
        with np.errstate(all="ignore"), warnings.catch_warnings():
            # Both are bounds whatever the order is; a better order would only make them tighter.
            warnings.filterwarnings("ignore", message="Optimal order is the")
            epsilon = float(get_epsilon(delta=self.delta, **options))
        return max(0.0, epsilon) if not math.isnan(epsilon) else math.inf

    def summary(self) -> str:
        """One line: what was spent, on what.

        Example:
            >>> PrivacyAccount(noise_multiplier=1.0, sample_rate=0.01, num_steps=1000, delta=1e-5).summary()
            'epsilon 1.84 at delta 1e-05, for each text (noise multiplier 1, sample rate 0.01, 1,000 steps)'
        """
        return (
            f"epsilon {self.epsilon:.2f} at delta {self.delta:g}, for each text (noise multiplier "
            f"{self.noise_multiplier:.3g}, sample rate {self.sample_rate:.3g}, {self.num_steps:,} steps)"
        )


ASSUMPTIONS = (
    "The unit is one text with all its target tokens: with or without any one text, the trained weights are equally "
    "likely up to a factor exp(epsilon), but for a probability delta. A person with k texts in the data is protected "
    "less: k times epsilon, and a larger delta.",
    "At each step every text is drawn with the sample rate, independently of all others (Poisson sampling). The number "
    "of texts counts as public.",
    "The seed of the noise and of the sampling stays secret. It is in the checkpoint: delete that when the run is "
    "over.",
    "Covered are the trained weights. Not covered: losses on the training texts in progress, metrics and reports; the "
    "cloud, which reads the texts to make features of them; a gate or threshold tuned on private texts.",
    "Not covered: the choice of hyper-parameters, of the best epoch or of an initialisation by looking at private "
    "texts. Choose them on public ones.",
    "Not covered: what the base model knows from its own training.",
    "The noise is computed in float32 from NumPy's Philox generator. That is no cryptographic generator, and attacks "
    "on the rounding of floating-point noise (Mironov, 2012) are not defended against.",
)
"""What an epsilon of `PrivacyAccount` rests on, one sentence or two each, for people."""


def noise_for_epsilon(target_epsilon: float, *, sample_rate: float, num_steps: int, delta: float) -> float:
    """The noise multiplier that keeps epsilon at or below the target, and hardly more than is needed (0.5 %).

    Args:
        target_epsilon: the budget.
        sample_rate, num_steps, delta: as in `PrivacyAccount`.

    Raises:
        InputError: an impossible value, or no reasonable noise is enough.

    Example:
        >>> sigma = noise_for_epsilon(2.0, sample_rate=0.01, num_steps=1000, delta=1e-5)
        >>> 0.9 < sigma < 1.0
        True
    """
    if not (math.isfinite(target_epsilon) and target_epsilon > 0):
        raise InputError(f"target_epsilon is {target_epsilon}, expected a positive number")
    if num_steps < 1:
        raise InputError(f"num_steps is {num_steps}, expected at least 1")

    def account(noise_multiplier: float) -> PrivacyAccount:
        return PrivacyAccount(
            noise_multiplier=noise_multiplier, sample_rate=sample_rate, num_steps=num_steps, delta=delta
        )

    def keeps_to_it(noise_multiplier: float) -> bool:
        """The tighter accountant is slow: it only looks where RDP has led."""
        tried = account(noise_multiplier)
        by_prv = tried.epsilon_prv() if tried.epsilon_rdp(_WHOLE_ORDERS) <= MAX_PRV_EPSILON else math.inf
        return (by_prv if by_prv < math.inf else tried.epsilon_rdp()) <= target_epsilon

    low, high = 0.0, 1.0
    while account(high).epsilon_rdp(_WHOLE_ORDERS) > target_epsilon:
        low, high = high, 2 * high
        if high > MAX_NOISE_MULTIPLIER:
            raise InputError(
                f"target_epsilon is {target_epsilon} at delta {delta:g}, and not even a noise multiplier of "
                f"{MAX_NOISE_MULTIPLIER:g} keeps to it over {num_steps:,} steps; raise it, or take fewer steps"
            )
    high = _least(lambda sigma: account(sigma).epsilon_rdp(_WHOLE_ORDERS) <= target_epsilon, low, high)
    while keeps_to_it(_STEP_DOWN * high):
        high *= _STEP_DOWN
    return _least(keeps_to_it, _STEP_DOWN * high, high)


def _least(is_enough: Callable[[float], bool], low: float, high: float) -> float:
    """The least value that is enough, from above; `low` is not and `high` is."""
    while high - low > NOISE_TOLERANCE * high:
        middle = (low + high) / 2
        low, high = (low, middle) if is_enough(middle) else (middle, high)
    return high


def default_delta(num_texts: int) -> float:
    """A tenth of one divided by the number of texts, 1e-5 at most.

    With delta = 1 / N, publishing one text at random would count as private.

    Example:
        >>> default_delta(500), default_delta(1_000_000)
        (1e-05, 1e-07)
    """
    if num_texts < 1:
        raise InputError(f"num_texts is {num_texts}, expected at least 1")
    return min(1e-5, 1 / (10 * num_texts))


def measure_noise_multiplier(draws: NDArray[np.float64], clip: float) -> tuple[float, float]:
    """The noise multiplier that draws of the noise show, to be held against the one that the account states.

    Args:
        draws: noise on a sum as a step adds it, (draws,), at least two: what is left of noisy sums over no text.
        clip: C.

    Returns:
        sqrt(mean of draw^2) / C, in which noise off the centre shows too, and its standard error sigma / sqrt(2 n).

    Raises:
        InputError: too few draws, or an impossible clipping norm.

    Example:
        >>> sigma, error = measure_noise_multiplier(np.array([1.0, -1.0, 1.0, -1.0]), 0.5)
        >>> sigma, round(error, 3)
        (2.0, 0.707)
    """
    if draws.ndim != 1 or len(draws) < 2:
        raise InputError(f"draws has shape {draws.shape}, expected (draws,) with at least two")
    if not (math.isfinite(clip) and clip > 0):
        raise InputError(f"clip is {clip}, expected a positive number")
    sigma = float(np.sqrt(np.square(draws, dtype=np.float64).mean())) / clip
    return sigma, sigma / math.sqrt(2 * len(draws))

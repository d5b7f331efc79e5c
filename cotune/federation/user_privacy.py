"""Differential privacy of a whole device: each sends one vector, which is clipped, and the mean gets Gaussian noise.

DP-FedAvg (McMahan et al., arXiv 1710.06963) with fixed clipping:

    released = (sum_i clip_C(update_i)) / N + N(0, (z C / N)^2)    in each coordinate
    clip_C(x) = x min(1, C / ||x||_2)

Symbols: C is `clip_norm`, z `noise_multiplier`, N the expected number of devices of a round, or the number that was
asked; never the number that replied. One device changes the sum by at most C, so a round is a Gaussian mechanism with
noise multiplier z, and T rounds on all devices are one with z / sqrt(T). In seed mode and with one tuned LoRA matrix
the vector is short, and the noise falls on few numbers.

`ASSUMPTIONS` says in plain words what an epsilon of `UserPrivacyAccount` rests on.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cotune.errors import InputError
from cotune.federation.gaussian_privacy import Gaussian, epsilon_between
from cotune.federation.number_ranges import check_at_least, check_positive, check_share
from cotune.federation.robust.votes import read_votes

_ENTROPY_BYTES = 32


@dataclass(frozen=True, kw_only=True)
class PrivateMean:
    """The clipped and noisy mean; see this module's head.

    Every device counts once: weights are all equal, or 0 for a device that is left out.

    Example:
        >>> private = PrivateMean(clip_norm=1.0, noise_multiplier=1.0, num_expected=1e6)
        >>> updates = np.array([[3e6, 4e6]] * 2, dtype=np.float32)
        >>> released = private(updates, np.ones(2))  # each is clipped to (0.6, 0.8); their sum by 1e6, and noise
        >>> bool(np.abs(released).max() < 2e-5)
        True
    """

    clip_norm: float
    """C, the largest L2 norm of a device's update. Chosen without looking at private data."""
    noise_multiplier: float
    """z, the standard deviation of the noise on the sum, in units of `clip_norm`."""
    num_expected: float | None = None
    """N, the expected number of devices of a round: sample rate times devices. None: each call says how many were
    asked."""

    def __post_init__(self) -> None:
        check_positive(clip_norm=self.clip_norm)
        check_positive(noise_multiplier=self.noise_multiplier)
        if self.num_expected is not None:
            check_positive(num_expected=self.num_expected)

    def __call__(
        self,
        updates: NDArray[np.float32],
        weights: NDArray[np.float64],
        /,
        *,
        num_asked: int | None = None,
        generator: np.random.Generator | None = None,
    ) -> NDArray[np.float32]:
        """What may be released of these updates.

        Args:
            updates: float32 (num_devices, d); may have no row, and then noise alone is released.
            weights: float64 (num_devices,), equal numbers, or 0.
            num_asked: N where there is no `num_expected`: the devices that were asked, replied or not.
            generator: of the noise. For tests; None for one seeded by the operating system, as it must be otherwise.

        Returns:
            float32 (d,).

        Raises:
            InputError: unequal weights, no N or two of them, more replies than were asked, or what `RobustRule`
                refuses.
        """
        votes = read_votes(updates, weights, min_replies=0, reader="the private mean")
        if votes.num and not (votes.weights == votes.weights[0]).all():
            raise InputError(
                "weights differ, expected equal ones or 0; each device counts once, or the noise would be too little "
                "for the heavier ones"
            )
        num_devices = self._denominator(votes.num, num_asked)
        norms = votes.norms()
        scales = np.minimum(1.0, self.clip_norm / np.maximum(norms, self.clip_norm))
        generator = fresh_generator() if generator is None else generator
        released = np.empty(votes.dim, dtype=np.float32)
        for columns, block in votes.blocks():
            noise = generator.standard_normal(block.shape[1]) * (self.noise_multiplier * self.clip_norm)
            released[columns] = (scales @ block + noise) / num_devices
        return released

    def noise_to_signal(self, dim: int, num_devices: float) -> float:
        """The noise's expected norm over the largest that a mean of clipped updates can have: z sqrt(d) / N.

        Above 1 the noise is longer than any update can be; training then lives on the average over rounds.

        Example:
            >>> PrivateMean(clip_norm=1.0, noise_multiplier=1.0).noise_to_signal(1024, 10)
            3.2
        """
        return self.noise_multiplier * math.sqrt(dim) / num_devices

    def _denominator(self, num_replies: int, num_asked: int | None) -> float:
        if (self.num_expected is None) == (num_asked is None):
            missing = "both are missing" if num_asked is None else "both were given"
            raise InputError(
                f"num_expected or num_asked is what the sum is divided by, and {missing}; give one of them"
            )
        if self.num_expected is not None:
            return self.num_expected
        assert num_asked is not None
        if num_asked < max(1, num_replies):
            raise InputError(
                f"num_asked is {num_asked} and {num_replies} devices replied, expected at least as many; count all "
                "devices that were asked, also those that did not answer"
            )
        return float(num_asked)


def fresh_generator() -> np.random.Generator:
    """A Philox generator whose 256-bit seed the operating system has just drawn and nobody keeps."""
    seed = np.random.SeedSequence(int.from_bytes(os.urandom(_ENTROPY_BYTES), "little"), pool_size=8)
    return np.random.Generator(np.random.Philox(seed))


@dataclass(frozen=True, kw_only=True)
class UserPrivacyAccount:
    """What a federation has spent on each of its devices.

    Attributes:
        noise_multiplier: z.
        num_rounds: T, rounds whose result was released, to whomever.
        delta: the probability that the bound may fail with; far below one divided by the number of devices.
        sample_rate: q, the probability of each device in each round, drawn independently of all others and in secret;
            1 where all devices are asked, or where somebody may know who was.
    """

    noise_multiplier: float
    num_rounds: int
    delta: float
    sample_rate: float = 1.0

    def __post_init__(self) -> None:
        check_positive(noise_multiplier=self.noise_multiplier)
        check_at_least(0, num_rounds=self.num_rounds)
        if not 0 < self.delta < 1:
            raise InputError(f"delta is {self.delta}, expected above 0 and below 1")
        check_share(sample_rate=self.sample_rate)

    @property
    def epsilon(self) -> float:
        """The smaller of both bounds, or the exact one where all devices take part.

        Example:
            >>> round(UserPrivacyAccount(noise_multiplier=1.0, num_rounds=10, delta=1e-5).epsilon, 1)
            17.9
        """
        exact = self.epsilon_without_sampling()
        return exact if self.sample_rate == 1 else min(exact, self.epsilon_with_sampling())

    def epsilon_without_sampling(self) -> float:
        """Exact where every device is in every round, and a bound where fewer are.

        Balle and Wang, arXiv 1805.06530, theorem 8, for a Gaussian mechanism whose shift is mu = sqrt(T) / z:
            delta = Phi(mu / 2 - epsilon / mu) - exp(epsilon) Phi(-mu / 2 - epsilon / mu)
        Renyi accountants bound the same number from above, by 4 to 9 % at delta 1e-5.
        """
        shift = math.sqrt(self.num_rounds) / self.noise_multiplier
        return epsilon_between(Gaussian(mean=0, std=1), Gaussian(mean=shift, std=1), self.delta)

    def epsilon_with_sampling(self) -> float:
        """A bound that Poisson sampling of devices makes smaller, by the accountants of Opacus.

        Raises:
            InputError: PyTorch or Opacus is not installed.
        """
        try:
            # Only here: everything else in this file is NumPy, and this brings PyTorch.
            from cotune.tuning.privacy_account import PrivacyAccount
        except ImportError as error:
            raise InputError(
                f"sample_rate is {self.sample_rate}, and epsilon with sampling needs PyTorch and Opacus; "
                "pip install 'cotune[train,private]', or take sample_rate 1, a larger bound"
            ) from error
        return PrivacyAccount(
            noise_multiplier=self.noise_multiplier,
            sample_rate=self.sample_rate,
            num_steps=self.num_rounds,
            delta=self.delta,
        ).epsilon

    def summary(self) -> str:
        """One line: what was spent, on what.

        Example:
            >>> UserPrivacyAccount(noise_multiplier=4.0, num_rounds=40, delta=1e-5).summary()
            'epsilon 7.51 at delta 1e-05, for each device (noise multiplier 4, sample rate 1, 40 rounds)'
        """
        return (
            f"epsilon {self.epsilon:.2f} at delta {self.delta:g}, for each device (noise multiplier "
            f"{self.noise_multiplier:.3g}, sample rate {self.sample_rate:.3g}, {self.num_rounds:,} rounds)"
        )


ASSUMPTIONS = (
    "The unit is one device with all its data: with or without any one device's updates, all released results together "
    "are equally likely up to a factor exp(epsilon), but for a probability delta. A person with several devices is "
    "protected less.",
    "The server is trusted: it sees each device's update as it is and adds the noise afterwards. Whoever receives the "
    "results alone is who the promise is against.",
    "The sum is divided by the expected number of devices, or by the number that was asked, never by the number that "
    "replied. A lost or refused reply counts as zeros: it makes the result smaller and costs no privacy.",
    "Every device is clipped to the same norm and counts once. The norm was chosen without looking at private updates; "
    "the median of their norms would be such a look.",
    "A sample rate below 1 counts only if each device is drawn by itself with that probability, from a secret seed, "
    "and nobody who sees results learns who took part. A fixed number of devices, those that happen to be online, or a "
    "public list: take sample rate 1.",
    "Every released result counts as a round, also one that was later rolled back, and both results of a round that "
    "was computed again after a crash. Choosing to roll back, by held-out data of the server alone, costs nothing "
    "more.",
    "Not covered: metrics. Losses, norms, the list of who replied and byte counts are reported without noise.",
    "Not covered: which reply is refused for its shape, its size or its numbers, and robust rules, which have no bound "
    "of this kind; a rule in place of this mean has no epsilon.",
    "Not covered: hyper-parameters chosen by looking at private data, and what the base model knows from its own "
    "training.",
    "With N = 10 devices this is cosmetic: 40 rounds at z = 4 give epsilon 7.5 at delta 1e-5, and the noise is then 13 "
    "times as long as any update at 1,024 numbers. Hundreds of devices in each round are needed, or privacy for each "
    "text, on the device.",
    "The noise is made in float64 from NumPy's Philox generator, seeded by the operating system. That is no "
    "cryptographic generator, and attacks on the rounding of floating-point noise (Mironov, 2012) are not defended "
    "against.",
)
"""What an epsilon of `UserPrivacyAccount` rests on, one to three sentences each, for people."""

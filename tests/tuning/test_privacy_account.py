from __future__ import annotations

import math
import sys

import numpy as np
import pytest

from cotune.errors import InputError
from cotune.tuning.privacy_account import (
    ASSUMPTIONS,
    PrivacyAccount,
    default_delta,
    measure_noise_multiplier,
    noise_for_epsilon,
)

pytest.importorskip("opacus", reason="accounts are computed by Opacus")


def gaussian_epsilon(sigma: float, delta: float) -> float:
    """One Gaussian release of sensitivity 1, exact: Balle and Wang, arXiv 1805.06530, theorem 8."""

    def phi(x: float) -> float:
        return 0.5 * math.erfc(-x / math.sqrt(2))

    low, high = 0.0, 100.0
    while high - low > 1e-9:
        middle = (low + high) / 2
        reached = phi(0.5 / sigma - middle * sigma) - math.exp(middle) * phi(-0.5 / sigma - middle * sigma)
        low, high = (middle, high) if reached > delta else (low, middle)
    return high


@pytest.mark.parametrize("sigma", [0.8, 1.0, 2.0, 8.0])
def test_one_step_on_all_texts_is_the_gaussian_mechanism(sigma: float) -> None:
    account = PrivacyAccount(noise_multiplier=sigma, sample_rate=1.0, num_steps=1, delta=1e-5)
    exact = gaussian_epsilon(sigma, 1e-5)
    assert exact <= account.epsilon_prv() <= exact + 0.02
    # RDP by hand: Gaussian of order a costs a / (2 sigma^2); the best order turns it into epsilon (Balle et al., 2020).
    orders = [1 + x / 1000 for x in range(1, 200_000)]
    by_hand = min(a / (2 * sigma**2) + math.log((a - 1) / a) - (math.log(1e-5) + math.log(a)) / (a - 1) for a in orders)
    assert account.epsilon_rdp() == pytest.approx(by_hand, rel=0.01)
    assert account.epsilon == min(account.epsilon_prv(), account.epsilon_rdp())


def test_many_steps_on_all_texts_are_one_with_less_noise() -> None:
    many = PrivacyAccount(noise_multiplier=8.0, sample_rate=1.0, num_steps=16, delta=1e-6)
    assert many.epsilon == pytest.approx(gaussian_epsilon(2.0, 1e-6), abs=0.02)


def test_agrees_with_the_accountants_of_opacus() -> None:
    from opacus.accountants import RDPAccountant

    account = PrivacyAccount(noise_multiplier=1.1, sample_rate=0.02, num_steps=500, delta=1e-5)
    theirs = RDPAccountant()
    for _ in range(500):
        theirs.step(noise_multiplier=1.1, sample_rate=0.02)
    assert account.epsilon_rdp() == pytest.approx(theirs.get_epsilon(1e-5), rel=1e-6)
    assert account.epsilon < account.epsilon_rdp()


def test_a_value_of_the_literature() -> None:
    # Abadi et al., section 1 of the appendix's accountant: q 0.01, sigma 4, 10,000 steps, delta 1e-5: 1.26.
    account = PrivacyAccount(noise_multiplier=4.0, sample_rate=0.01, num_steps=10_000, delta=1e-5)
    assert 0.9 < account.epsilon <= 1.26


def test_much_noise_gains_by_high_orders_and_little_noise_ends_without_prv() -> None:
    from opacus.accountants import RDPAccountant

    theirs = RDPAccountant()
    theirs.history = [(50.0, 0.1, 10)]
    with pytest.warns(UserWarning, match="Optimal order"):
        coarse = theirs.get_epsilon(1e-6)
    much = PrivacyAccount(noise_multiplier=50.0, sample_rate=0.1, num_steps=10, delta=1e-6)
    assert much.epsilon_rdp() < coarse / 2
    little = PrivacyAccount(noise_multiplier=0.05, sample_rate=0.5, num_steps=100, delta=1e-5)
    assert little.epsilon == little.epsilon_rdp() > 1000
    assert PrivacyAccount(noise_multiplier=1.0, sample_rate=0.5, num_steps=0, delta=1e-5).epsilon == 0.0


@pytest.mark.parametrize(
    ("target", "rate", "steps", "delta"),
    [
        (0.5, 0.02, 100, 1e-5),
        (4.0, 0.3, 10, 1e-5),
        (2.0, 1.0, 1, 1e-5),
        (60.0, 1.0, 1, 1e-5),  # PRV is not asked
        (3.0, 1.0, 1, 1e-18),  # PRV has no answer
    ],
)
def test_found_noise_keeps_to_the_target_and_is_no_more_than_needed(
    target: float, rate: float, steps: int, delta: float
) -> None:
    sigma = noise_for_epsilon(target, sample_rate=rate, num_steps=steps, delta=delta)
    shape = {"sample_rate": rate, "num_steps": steps, "delta": delta}
    assert PrivacyAccount(noise_multiplier=sigma, **shape).epsilon <= target
    assert PrivacyAccount(noise_multiplier=0.98 * sigma, **shape).epsilon > target


def test_the_stated_scale_can_be_held_against_draws() -> None:
    draws = 0.6 * np.random.default_rng(0).standard_normal(100_000)
    sigma, error = measure_noise_multiplier(draws, 0.2)
    assert abs(sigma - 3.0) < 5 * error < 0.05
    shifted, error = measure_noise_multiplier(draws + 0.1, 0.2)
    assert abs(shifted - 3.0) > 5 * error
    with pytest.raises(InputError, match="draws has shape"):
        measure_noise_multiplier(np.zeros(1), 1.0)
    with pytest.raises(InputError, match="clip is 0"):
        measure_noise_multiplier(np.zeros(4), 0.0)


def test_a_zeroth_order_step_is_bounded_as_the_account_says() -> None:
    """Adding one text moves the vector of K clipped sums by at most sqrt(K) C, and by that much where all clip."""
    clip, num_directions = 0.3, 9
    slopes = 50.0 + np.random.default_rng(0).standard_normal((8, num_directions))
    sums = [np.clip(rows, -clip, clip).sum(axis=0) for rows in (slopes, slopes[1:])]
    assert np.linalg.norm(sums[0] - sums[1]) == pytest.approx(math.sqrt(num_directions) * clip)


def test_words() -> None:
    summary = PrivacyAccount(noise_multiplier=1.0, sample_rate=0.5, num_steps=2, delta=1e-5).summary()
    assert summary.startswith("epsilon ") and "for each text" in summary and "2 steps" in summary
    text = " ".join(ASSUMPTIONS)
    for words in ("one text", "Poisson", "secret", "hyper-parameters", "best epoch", "base model"):
        assert words in text


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"noise_multiplier": 0.0}, "noise_multiplier is 0.0"),
        ({"noise_multiplier": math.nan}, "noise_multiplier is nan"),
        ({"sample_rate": 0.0}, "sample_rate is 0.0"),
        ({"sample_rate": 2.0}, "sample_rate is 2.0"),
        ({"num_steps": -1}, "num_steps is -1"),
        ({"delta": 0.0}, "delta is 0.0"),
        ({"delta": 1.0}, "delta is 1.0"),
    ],
)
def test_bad_accounts(wrong: dict[str, float], words: str) -> None:
    with pytest.raises(InputError, match=words):
        PrivacyAccount(**{"noise_multiplier": 1.0, "sample_rate": 0.5, "num_steps": 1, "delta": 1e-5, **wrong})


def test_bad_targets() -> None:
    with pytest.raises(InputError, match="target_epsilon is -1"):
        noise_for_epsilon(-1.0, sample_rate=0.1, num_steps=1, delta=1e-5)
    with pytest.raises(InputError, match="num_steps is 0"):
        noise_for_epsilon(1.0, sample_rate=0.1, num_steps=0, delta=1e-5)
    tiny = PrivacyAccount(noise_multiplier=10.0, sample_rate=1.0, num_steps=1, delta=1e-18)
    assert tiny.epsilon_prv() == math.inf and tiny.epsilon == tiny.epsilon_rdp() < math.inf
    with pytest.raises(InputError, match="not even a noise multiplier"):
        noise_for_epsilon(1e-4, sample_rate=1.0, num_steps=100_000, delta=1e-12)
    with pytest.raises(InputError, match="num_texts is 0"):
        default_delta(0)


def test_without_opacus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opacus.accountants", None)
    with pytest.raises(InputError, match=r"pip install 'cotune\[private\]'"):
        _ = PrivacyAccount(noise_multiplier=1.0, sample_rate=0.5, num_steps=1, delta=1e-5).epsilon

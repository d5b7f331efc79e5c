"""Bounds of a probability hold what the whole vocabulary says."""

from __future__ import annotations

import numpy as np
import pytest

from cotune.device.serve.probability import Bounds, probability_bounds
from cotune.generation.sampling import PartialLogits, Sampling, top_logits


def exact(logits: np.ndarray) -> np.ndarray:
    weights = np.exp(logits.astype(np.float64) - logits.max())
    return weights / weights.sum()


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(temperature=1.0, top_p=0.9), Sampling(temperature=0.5)])
@pytest.mark.parametrize("k", [1, 8, 32, 64])
def test_the_bounds_hold_the_probability(sampling: Sampling, k: int) -> None:
    rng = np.random.default_rng(k)
    for _ in range(20):
        z = (3 * rng.standard_normal(64)).astype(np.float32)
        delta = rng.standard_normal(64).astype(np.float32)
        base = top_logits(z, k, sampling)
        token = int(rng.choice(base.ids))
        bounds = probability_bounds(base, delta, token, sampling, adds_base=True)
        assert bounds is not None
        p = exact(z + delta)[token]
        assert bounds.low - 1e-6 <= p <= bounds.high + 1e-6
        if k == 64:
            assert bounds.high - bounds.low < 1e-9 and bounds.middle == pytest.approx(p, abs=1e-6)


def test_the_normaliser_makes_the_bounds_narrower() -> None:
    z = np.linspace(0, 4, 64).astype(np.float32)
    delta = np.zeros(64, np.float32)
    widths = []
    for sampling in (Sampling(), Sampling(temperature=1.0, top_p=0.9)):
        bounds = probability_bounds(top_logits(z, 8, sampling), delta, 63, sampling, adds_base=True)
        assert bounds is not None
        widths.append(bounds.high - bounds.low)
    # Without any delta the normaliser says it all.
    assert widths[0] > 0.01 and widths[1] == pytest.approx(0, abs=1e-9)


def test_by_hand() -> None:
    base = PartialLogits(ids=np.array([1, 2]), logits=np.log(np.array([2.0, 4.0], np.float32)))
    # exp: unlisted at most 2 * 1, listed 2 * 1 and 4 * 3.
    delta = np.log(np.array([1.0, 1.0, 3.0], np.float32))
    bounds = probability_bounds(base, delta, 2, Sampling(), adds_base=True)
    assert bounds is not None
    assert (bounds.low, bounds.high) == (pytest.approx(12 / 16), pytest.approx(12 / 14))
    assert bounds.middle is None


def test_where_delta_stands_alone_it_is_exact() -> None:
    delta = np.log(np.array([1.0, 3.0], np.float32))
    empty = PartialLogits(ids=np.empty(0, np.int64), logits=np.empty(0, np.float32))
    bounds = probability_bounds(empty, delta, 1, Sampling(), adds_base=False)
    assert bounds is not None and bounds.middle == pytest.approx(0.75)


def test_a_token_that_is_not_listed_is_not_known() -> None:
    base = PartialLogits(ids=np.array([1]), logits=np.zeros(1, np.float32))
    assert probability_bounds(base, np.zeros(3, np.float32), 2, Sampling(), adds_base=True) is None
    assert probability_bounds(base, np.zeros(3, np.float32), 0, Sampling(), adds_base=True) is None


def test_one_number_is_told_only_where_it_is_clear() -> None:
    assert Bounds(0.5, 0.51).middle == pytest.approx(0.505)
    assert Bounds(0.5, 0.6).middle is None

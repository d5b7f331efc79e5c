from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from cotune.generation.noise import gumbel

KNOWN = [0.2124454876501489, 1.0286354444226344, -0.9076112712815784]
SEEDS = st.integers(0, 2**64 - 1)


@given(SEEDS, st.integers(0, 2**31), st.lists(st.integers(0, 2**24), min_size=1, max_size=20))
def test_depends_on_seed_position_and_id_alone(seed: int, position: int, ids: list[int]) -> None:
    together = gumbel(seed, position, np.array(ids))
    alone = [gumbel(seed, position, np.array([i]))[0] for i in ids]
    assert together.tolist() == alone
    assert np.isfinite(together).all()


def test_known_values_stay_what_they_are() -> None:
    # Written down once: a change here would change every sampled text for a given seed.
    values = gumbel(42, 7, np.array([0, 1, 31_999]))
    np.testing.assert_allclose(values, KNOWN, rtol=1e-12)


def test_is_standard_gumbel() -> None:
    values = gumbel(3, 5, np.arange(200_000))
    assert abs(values.mean() - 0.5772) < 0.01
    assert abs(values.std() - np.pi / np.sqrt(6)) < 0.01


def test_positions_and_seeds_are_independent() -> None:
    ids = np.arange(20_000)
    for other in (gumbel(1, 2, ids), gumbel(2, 1, ids), gumbel(2**63, 1, ids)):
        assert abs(np.corrcoef(gumbel(1, 1, ids), other)[0, 1]) < 0.03


def test_gumbel_max_draws_from_the_softmax() -> None:
    logits = np.log([0.5, 0.3, 0.2])
    draws = [int((logits + gumbel(9, t, np.arange(3))).argmax()) for t in range(6000)]
    np.testing.assert_allclose(np.bincount(draws) / 6000, [0.5, 0.3, 0.2], atol=0.025)

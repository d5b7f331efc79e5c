from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from cotune.errors import InputError
from cotune.federation.robust.trimmed_mean import TrimmedMean


def test_ten_numbers_by_hand() -> None:
    updates = np.array([[9], [1], [2], [-900], [4], [5], [6], [7], [8], [1000]], dtype=np.float32)
    # Two are cut at each end: -900, 1 and 9, 1000. (2 + 4 + 5 + 6 + 7 + 8) / 6
    assert TrimmedMean(share=0.2)(updates, np.ones(10))[0] == np.float32(32 / 6)


@given(
    st.integers(3, 20).flatmap(lambda n: arrays(np.float32, (n, 2), elements=st.floats(-100, 100, width=32))),
    st.sampled_from([0.05, 0.1, 0.2, 0.29, 1 / 3, 0.4, 0.49]),
)
def test_cuts_what_it_says(updates: np.ndarray, share: float) -> None:
    rule = TrimmedMean(share=share)
    num = len(updates)
    if num < rule.min_replies:
        with pytest.raises(InputError, match="needs at least"):
            rule(updates, np.ones(num))
        return
    num_cut = rule.max_byzantine(num)
    assert 1 <= num_cut <= share * num + 1e-9
    kept = np.sort(updates.astype(np.float64), axis=0)[num_cut : num - num_cut]
    np.testing.assert_allclose(rule(updates, np.ones(num)), kept.mean(axis=0), rtol=1e-6, atol=1e-6)


@given(st.decimals("0.01", "0.49", places=2), st.integers(1, 200))
def test_the_share_is_taken_as_written(share: object, num: int) -> None:
    hundredths = round(float(str(share)) * 100)
    rule = TrimmedMean(share=float(str(share)))
    assert rule.max_byzantine(num) == hundredths * num // 100
    assert rule.max_byzantine(rule.min_replies) >= 1
    assert rule.min_replies == 3 or rule.max_byzantine(rule.min_replies - 1) == 0


def test_products_of_floats_lose_nobody() -> None:
    assert 0.29 * 100 < 29
    assert TrimmedMean(share=0.29).max_byzantine(100) == 29


@pytest.mark.parametrize("share", [0.0, -0.1, 0.5, 1.0, float("nan"), "0.2", True, None])
def test_bad_shares(share: object) -> None:
    with pytest.raises(InputError, match="share is"):
        TrimmedMean(share=share)  # type: ignore[arg-type]


def test_too_few_replies_to_cut_any() -> None:
    with pytest.raises(InputError, match=r"4 replies .* trimmed_mean with share 0.2 needs at least 5; wait"):
        TrimmedMean()(np.zeros((4, 1), dtype=np.float32), np.ones(4))

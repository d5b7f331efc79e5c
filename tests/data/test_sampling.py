from __future__ import annotations

from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cotune.data.sampling import draw
from cotune.errors import InputError

ITEMS = st.integers(0, 40).map(lambda num: [f"t{index}" for index in range(num)])
SEEDS = st.one_of(st.none(), st.integers(0, 2**32))


def test_without_a_seed_the_first_ones_come() -> None:
    assert draw(range(10), limit=3) == [0, 1, 2]
    assert draw(range(10), share=0.25) == [0, 1]
    assert draw(range(10)) == list(range(10))


def test_by_hand() -> None:
    """`Random(0)` gives 0.844, 0.758, 0.421, 0.259, 0.511: the smallest numbers are those of d, c, e, b, a."""
    assert draw("abcde", seed=0) == ["d", "c", "e", "b", "a"]
    assert draw("abcde", seed=0, limit=2) == ["d", "c"]
    assert draw("abcde", seed=0, share=0.6) == ["d", "c", "e"]
    assert draw("abcde", seed=0, share=0.6, limit=1) == ["d"]
    assert draw("abcde", seed=0, share=0.2, limit=4) == ["d"]


@given(items=ITEMS, seed=SEEDS, small=st.integers(1, 50), large=st.integers(1, 50), share=st.floats(0.01, 1))
def test_a_smaller_draw_begins_a_larger_one(
    items: list[str], seed: int | None, small: int, large: int, share: float
) -> None:
    whole = draw(items, seed=seed)
    assert sorted(whole) == sorted(items)
    assert draw(items, limit=small, seed=seed) == whole[:small]
    assert draw(items, limit=large, seed=seed)[:small] == whole[: min(small, large)]
    by_share = draw(items, share=share, seed=seed)
    assert by_share == whole[: len(by_share)]
    assert len(by_share) == (max(1, round(share * len(items))) if items else 0)


def test_seeds_differ_and_later_items_leave_the_order_of_the_others() -> None:
    assert draw(range(50), seed=1) != draw(range(50), seed=2)
    assert [item for item in draw(range(60), seed=1) if item < 50] == draw(range(50), seed=1)


def test_a_limit_without_a_seed_reads_no_further() -> None:
    def items() -> Iterator[int]:
        yield 1
        raise AssertionError("read too far")

    assert draw(items(), limit=1) == [1]


def test_arguments() -> None:
    with pytest.raises(InputError, match="limit is 0, expected at least 1"):
        draw([], limit=0)
    for share in (0.0, -0.1, 1.1, float("nan")):
        with pytest.raises(InputError, match=f"share is {share}, expected a number above 0 and at most 1"):
            draw([], share=share)

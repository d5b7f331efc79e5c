"""Dynamic time warping by hand, and against all paths there are."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cotune.distillation.nearest_tokens import edit_distance
from cotune.distillation.warped_tokens import warp
from cotune.errors import InputError


def paths(i: int, j: int, ends: tuple[int, int]) -> Iterator[list[tuple[int, int]]]:
    if (i, j) == ends:
        yield [(i, j)]
    for step in ((1, 1), (1, 0), (0, 1)):
        if i + step[0] <= ends[0] and j + step[1] <= ends[1]:
            for rest in paths(i + step[0], j + step[1], ends):
                yield [(i, j), *rest]


TOKENS = st.lists(st.text(alphabet="abc", min_size=1, max_size=3), min_size=1, max_size=4)


@settings(max_examples=30, deadline=None)
@given(TOKENS, TOKENS)
def test_the_path_is_one_and_none_is_cheaper(first: list[str], second: list[str]) -> None:
    found = [(place, token) for token, places in enumerate(warp(first, second)) for place in places]
    everything = list(paths(0, 0, (len(first) - 1, len(second) - 1)))
    assert found in everything

    def cost(path: list[tuple[int, int]]) -> int:
        return sum(edit_distance(first[i], second[j]) for i, j in path)

    assert cost(found) == min(map(cost, everything))


def test_a_token_that_the_other_side_splits_lies_beside_its_parts() -> None:
    assert warp(["aaa", "bbbb", "ccc"], ["aaa", "bb", "bb", "ccc"]) == [[0], [1], [1], [2]]
    assert warp(["aaa", "bb", "bb", "ccc"], ["aaa", "bbbb", "ccc"]) == [[0], [1, 2], [3]]
    # Its weakness: a short part is as near to a neighbour.
    assert warp(["a", "bc", "d"], ["a", "b", "c", "d"]) == [[0], [0], [1], [2]]
    with pytest.raises(InputError, match="0 and 1 tokens"):
        warp([], ["a"])

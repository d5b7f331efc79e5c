"""When a text ends, and how much of it is kept."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cotune.generation.request import GenerationRequest
from cotune.generation.stopping import Ending, find_ending

PIECES = ["a", "b", "cd", "\n", "é", ""]


def spell(token_ids: Sequence[int]) -> str:
    return "".join(PIECES[token_id] for token_id in token_ids)


def request(**changes: Any) -> GenerationRequest:
    return GenerationRequest(prompt_ids=np.array([1]), **{"max_new_tokens": 4, **changes})


def test_nothing_generated_is_no_end() -> None:
    assert find_ending([], request(stop_token_ids=(2,), stop_strings=("a",)), spell) is None


def test_an_end_token_is_kept_as_the_last() -> None:
    asked = request(stop_token_ids=(2, 5))
    assert find_ending([0, 1], asked, None) is None
    assert find_ending([0, 5], asked, None) == Ending("end_token", 2)
    # Only the last token is looked at: the caller asks after each one.
    assert find_ending([2, 0], asked, None) is None


def test_enough_tokens_end_a_text() -> None:
    assert find_ending([0, 0, 0], request(), None) is None
    assert find_ending([0, 0, 0, 0], request(), None) == Ending("length", 4)
    assert find_ending([0], request(max_new_tokens=1), None) == Ending("length", 1)


@pytest.mark.parametrize(
    ("token_ids", "stop_strings", "num_characters"),
    [
        ([0, 1], ("b",), 1),  # a|b
        ([0, 1], ("ab",), 0),  # |ab
        ([0, 2], ("c",), 1),  # inside a token: a|cd
        ([1, 2, 3], ("d\n",), 2),  # over two tokens: bc|d\n
        ([0, 4], ("é",), 1),  # characters, not bytes
        ([0, 1, 2], ("cd", "b"), 1),  # the first in the text, not in the list
        ([0, 1, 0], ("a",), 0),  # the first of several
    ],
)
def test_a_stop_string_cuts_the_text_before_it(
    token_ids: list[int], stop_strings: tuple[str, ...], num_characters: int
) -> None:
    ending = find_ending(token_ids, request(stop_strings=stop_strings), spell)
    assert ending == Ending("stop_string", len(token_ids), num_characters)


def test_stop_strings_that_do_not_occur_do_not_end() -> None:
    assert find_ending([0, 1], request(stop_strings=("ba", "abc")), spell) is None


def test_an_end_token_comes_before_a_stop_string_and_both_before_the_length() -> None:
    both = request(stop_token_ids=(1,), stop_strings=("b",), max_new_tokens=2)
    assert find_ending([0, 1], both, spell) == Ending("end_token", 2)
    assert find_ending([0, 1], request(stop_strings=("b",), max_new_tokens=2), spell) == Ending("stop_string", 2, 1)


@given(st.lists(st.integers(0, 5), min_size=1, max_size=12), st.text("abcd\né", min_size=1, max_size=3))
def test_asked_after_each_token_the_kept_text_never_holds_the_stop_string(token_ids: list[int], stop: str) -> None:
    asked = request(stop_strings=(stop,), max_new_tokens=12)
    for end in range(1, len(token_ids) + 1):
        ending = find_ending(token_ids[:end], asked, spell)
        if ending is not None and ending.reason == "stop_string":
            assert ending.num_characters is not None
            text = spell(token_ids[:end])
            assert stop not in text[: ending.num_characters]
            assert text[ending.num_characters :].startswith(stop)
            # The last token was needed for it.
            assert stop not in spell(token_ids[: end - 1])
            return
        assert stop not in spell(token_ids[:end])

"""Requests and decisions: what they refuse, and what they say about themselves."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from cotune.errors import InputError
from cotune.generation.modes import MODES
from cotune.generation.request import ANSWERS, SCHEDULES, Decision, GenerationRequest
from cotune.generation.sampling import Sampling


def test_what_is_left_out_is_greedy_integration() -> None:
    request = GenerationRequest(prompt_ids=np.array([5, 6]))
    assert request.mode == "integration" and request.combination is MODES["integration"]
    assert request.sampling == Sampling() and request.sampling.is_greedy
    assert (request.max_new_tokens, request.stop_token_ids, request.stop_strings) == (64, (), ())


def test_every_word_of_the_command_line_is_known() -> None:
    assert SCHEDULES == ("blocking", "gated", "optimistic", "drafted", "auto")
    assert ANSWERS == ("token", "correction")
    for mode in ("integration", "separation", "ladder", "spa"):
        assert GenerationRequest(prompt_ids=np.array([1]), mode=mode).combination.name == mode


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"mode": "both"}, "mode is 'both', expected one of integration"),
        ({"prompt_ids": np.empty(0, np.int64)}, "prompt_ids is empty, expected at least one token"),
        ({"prompt_ids": np.ones((1, 3), np.int64)}, "prompt_ids"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0, expected at least 1"),
        ({"stop_strings": ("x", "")}, "a stop string is empty"),
    ],
)
def test_impossible_requests_are_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        GenerationRequest(**{"prompt_ids": np.array([1]), **changes})


@pytest.mark.parametrize(
    ("token", "consulted", "changed", "source"),
    [(7, False, False, "cloud"), (7, True, False, "cloud"), (8, True, True, "device")],
)
def test_who_decided(token: int, consulted: bool, changed: bool, source: str) -> None:
    decision = Decision(token_id=token, base_token_id=7, consulted=consulted)
    assert (decision.changed, decision.source) == (changed, source)

from __future__ import annotations

import math

import pytest

from cotune.errors import InputError
from cotune.evaluation.judgement import judge


def test_generated_texts_by_hand() -> None:
    # Rouge-L of "a b d" against "a b c" is 2/3; the second text is exact.
    result = judge(["a b c", "The end."], predictions=["a b d", "end"])
    assert result.rouge_l == pytest.approx((2 / 3 + 2 / 3) / 2)
    assert result.exact_match == 0.5
    assert result.perplexity is None


def test_likelihoods_by_hand() -> None:
    # Two tokens of probability 1/2 and 1/8: 4 bits over 4 bytes; perplexity is the geometric mean 4.
    result = judge(["abcd"], token_nats=[math.log(2), math.log(8)])
    assert result.perplexity == pytest.approx(4.0)
    assert result.bits_per_byte == pytest.approx(1.0)
    assert result.nats_per_token == pytest.approx(math.log(4))
    assert result.rouge_l is None


def test_nothing_to_judge_by_is_an_error() -> None:
    with pytest.raises(InputError, match="no texts"):
        judge([], predictions=[])

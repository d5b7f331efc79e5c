from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cotune.errors import InputError
from cotune.evaluation.likelihood_metrics import bits_per_byte, nats_per_token, perplexity


def test_by_hand() -> None:
    # Three tokens with p = 1/2, 1/4, 1/8: ln 64 nats, geometric mean 1/4.
    total_nats = math.log(2) + math.log(4) + math.log(8)
    assert nats_per_token(total_nats, 3) == pytest.approx(2 * math.log(2))
    assert perplexity(total_nats, 3) == pytest.approx(4.0)
    assert bits_per_byte(total_nats, 12) == pytest.approx(0.5)  # 6 bits over 12 bytes


def test_certain_and_hopeless() -> None:
    assert perplexity(0.0, 5) == 1.0
    assert perplexity(1000.0, 1) == math.inf


@given(st.integers(2, 100_000), st.integers(1, 1000))
def test_uniform_guessing_has_the_perplexity_of_the_vocabulary(vocab: int, num_tokens: int) -> None:
    assert perplexity(num_tokens * math.log(vocab), num_tokens) == pytest.approx(vocab)


@given(st.floats(0.0, 1e4), st.integers(1, 1000), st.integers(1, 5000))
def test_bits_and_nats_tell_the_same(total_nats: float, num_tokens: int, num_bytes: int) -> None:
    bits = bits_per_byte(total_nats, num_bytes) * num_bytes
    assert bits * math.log(2) == pytest.approx(nats_per_token(total_nats, num_tokens) * num_tokens)


@pytest.mark.parametrize("total_nats", [-0.1, math.nan, math.inf])
def test_rejects_what_is_no_likelihood(total_nats: float) -> None:
    with pytest.raises(InputError, match="total_nats"):
        perplexity(total_nats, 1)
    with pytest.raises(InputError, match="total_nats"):
        bits_per_byte(total_nats, 1)


def test_rejects_empty_texts() -> None:
    with pytest.raises(InputError, match="num_tokens is 0"):
        nats_per_token(1.0, 0)
    with pytest.raises(InputError, match="num_bytes is 0"):
        bits_per_byte(1.0, 0)

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cotune.errors import InputError
from cotune.generation.noise import gumbel
from cotune.generation.sampling import Sampling, choose, choose_certified, top_logits

SAMPLINGS = st.builds(
    Sampling,
    temperature=st.sampled_from([0.0, 0.3, 0.8, 1.0, 2.0]),
    top_p=st.sampled_from([0.1, 0.5, 0.9, 0.99, 1.0]),
    seed=st.integers(0, 2**64 - 1),
)


def test_greedy_takes_the_largest_and_the_lowest_id_of_a_tie() -> None:
    assert choose(np.array([1.0, 3.0, 3.0, 2.0], np.float32), Sampling(), 0) == 1


def test_top_p_by_hand() -> None:
    # Probabilities .5 .3 .2: at top_p .5 the first alone is enough, at .6 two are needed, at .81 all three.
    logits = np.log(np.array([0.2, 0.5, 0.3])).astype(np.float32)
    for top_p, allowed in ((0.5, {1}), (0.6, {1, 2}), (0.81, {0, 1, 2})):
        draws = {choose(logits, Sampling(temperature=1.0, top_p=top_p, seed=5), t) for t in range(300)}
        assert draws == allowed


def test_sampling_is_the_gumbel_maximum() -> None:
    logits = np.random.default_rng(0).standard_normal(50).astype(np.float32)
    for position in range(20):
        scores = logits.astype(np.float64) / 0.7 + gumbel(11, position, np.arange(50))
        assert choose(logits, Sampling(temperature=0.7, seed=11), position) == scores.argmax()


@settings(max_examples=300)
@given(
    sampling=SAMPLINGS,
    k=st.integers(1, 60),
    seed=st.integers(0, 10_000),
    strength=st.sampled_from([0.0, 0.1, 0.5, 2.0]),
    sharpness=st.sampled_from([0.5, 3.0, 8.0]),
    position=st.integers(0, 1000),
)
def test_a_certified_choice_is_the_full_choice(
    sampling: Sampling, k: int, seed: int, strength: float, sharpness: float, position: int
) -> None:
    rng = np.random.default_rng(seed)
    logits = (sharpness * rng.standard_normal(50)).astype(np.float32)
    delta = (strength * rng.standard_normal(50)).astype(np.float32)
    token = choose_certified(top_logits(logits, k, sampling), delta, sampling, position)
    if token is not None:
        assert token == choose(logits + delta, sampling, position)
    if k >= 50:
        assert token is not None


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(temperature=0.7), Sampling(temperature=0.7, top_p=0.9)])
def test_certificates_hold_for_most_positions_of_a_peaked_model(sampling: Sampling) -> None:
    rng = np.random.default_rng(1)
    held = 0
    for position in range(100):
        logits = (4 * rng.standard_normal(500)).astype(np.float32)
        delta = (0.3 * rng.standard_normal(500)).astype(np.float32)
        held += choose_certified(top_logits(logits, 64, sampling), delta, sampling, position) is not None
    assert held > 60


def test_delta_alone_needs_no_base_logits() -> None:
    delta = np.array([0.0, 5.0, 1.0], np.float32)
    base = top_logits(np.array([9.0, 0.0, 0.0], np.float32), 1, Sampling())
    assert choose_certified(base, delta, Sampling(), 0, adds_base=False) == 1


def test_a_missed_certificate_says_so() -> None:
    # The listed token scores 1; an unlisted one could reach 1 + 3.
    base = top_logits(np.array([1.0, 0.9, 0.0], np.float32), 1, Sampling())
    assert choose_certified(base, np.array([0.0, 0.0, 3.0], np.float32), Sampling(), 0) is None


@pytest.mark.parametrize(
    ("field", "value"),
    [("temperature", -0.1), ("temperature", float("nan")), ("top_p", 0.0), ("top_p", 1.1), ("seed", -1)],
)
def test_bad_sampling_is_named(field: str, value: float) -> None:
    with pytest.raises(InputError, match=field):
        Sampling(**{field: value})

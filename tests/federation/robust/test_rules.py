"""What holds for every rule of the table."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cotune.errors import InputError
from cotune.federation.robust.rule import RobustRule
from cotune.federation.robust.rules import RULES, rule_named

OPTIONS: dict[str, dict[str, object]] = {
    "mean": {},
    "median": {},
    "trimmed_mean": {"share": 0.2},
    "multi_krum": {"num_byzantine": 2},
    "bulyan": {"num_byzantine": 2},
    "clip_to_median_norm": {"rule": {"name": "trimmed_mean", "share": 0.2}},
    "leave_out_long": {"rule": {"name": "trimmed_mean", "share": 0.2}, "times": 4},
}
RULE = pytest.mark.parametrize("name", RULES)
SEEDS = st.integers(0, 2**32 - 1)


def made(name: str) -> RobustRule:
    return rule_named(name, OPTIONS[name])


def drawn(seed: int, num: int = 12, dim: int = 5) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((num, dim)).astype(np.float32)


@RULE
def test_shape_type_and_input_left_alone(name: str) -> None:
    updates, weights = drawn(0), np.ones(12)
    combined = made(name)(updates, weights)
    assert (combined.shape, combined.dtype) == ((5,), np.float32)
    assert np.array_equal(updates, drawn(0)) and (weights == 1).all()


@RULE
def test_equal_updates_give_that_update(name: str) -> None:
    updates = np.tile(drawn(1, num=1), (12, 1))
    np.testing.assert_allclose(made(name)(updates, np.ones(12)), updates[0], rtol=1e-6)


@RULE
@settings(max_examples=30)
@given(seed=SEEDS)
def test_the_order_of_replies_does_not_matter(name: str, seed: int) -> None:
    updates = drawn(seed)
    order = np.random.default_rng(seed + 1).permutation(12)
    rule = made(name)
    np.testing.assert_allclose(rule(updates, np.ones(12)), rule(updates[order], np.ones(12)), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["mean", "median", "trimmed_mean", "multi_krum", "bulyan"])
@settings(max_examples=30)
@given(seed=SEEDS, shift=st.floats(-64, 64, width=32))
def test_moving_all_updates_moves_the_result(name: str, seed: int, shift: float) -> None:
    updates, rule = drawn(seed), made(name)
    moved = (updates + np.float32(shift)).astype(np.float32)
    np.testing.assert_allclose(rule(moved, np.ones(12)), rule(updates, np.ones(12)) + shift, rtol=1e-4, atol=1e-4)


@RULE
@settings(max_examples=30)
@given(seed=SEEDS, exponent=st.integers(-20, 20))
def test_scaling_all_updates_scales_the_result(name: str, seed: int, exponent: int) -> None:
    updates, rule, factor = drawn(seed), made(name), np.float32(2.0**exponent)
    np.testing.assert_allclose(rule(updates * factor, np.ones(12)), rule(updates, np.ones(12)) * factor, rtol=1e-6)


LIES = st.sampled_from(["huge", "tiny step", "minus ten", "one honest", "mean of honest, one coordinate wild", "zero"])


def lie(kind: str, honest: np.ndarray, num: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    mean = honest.mean(axis=0)
    if kind == "huge":
        rows = rng.choice([-3e38, 3e38], size=(num, honest.shape[1]))
    elif kind == "tiny step":
        rows = np.tile(mean + 1.5 * honest.std(axis=0), (num, 1))
    elif kind == "minus ten":
        rows = np.tile(-10 * mean, (num, 1))
    elif kind == "one honest":
        rows = np.tile(honest[0], (num, 1))
    elif kind == "zero":
        rows = np.zeros((num, honest.shape[1]))
    else:
        rows = np.tile(mean, (num, 1))
        rows[:, rng.integers(honest.shape[1])] += 5
    return rows.astype(np.float32)


# Of Bulyan's kept numbers a liar's may lie beyond the honest ones, but no farther from the median than an honest one.
@pytest.mark.parametrize(("name", "slack"), [("median", 0), ("trimmed_mean", 0), ("bulyan", 1)])
@settings(max_examples=60)
@given(seed=SEEDS, kind=LIES, extra=st.integers(0, 4))
def test_each_coordinate_lies_among_the_honest_ones(name: str, slack: int, seed: int, kind: str, extra: int) -> None:
    rule = made(name)
    num = max(rule.min_replies, 7) + extra
    num_liars = rule.max_byzantine(num)
    assert num_liars >= 1
    honest = drawn(seed, num=num - num_liars)
    updates = np.vstack([lie(kind, honest, num_liars, seed), honest])
    combined = rule(updates, np.ones(num))
    low, high = honest.min(axis=0), honest.max(axis=0)
    assert (low - slack * (high - low) <= combined).all() and (combined <= high + slack * (high - low)).all()


@pytest.mark.parametrize("name", [name for name in RULES if name != "mean"])
@settings(max_examples=30)
@given(seed=SEEDS, kind=LIES)
def test_as_many_liars_as_it_bears_leave_the_result_near_the_honest(name: str, seed: int, kind: str) -> None:
    rule = made(name)
    num_liars = rule.max_byzantine(12)
    honest = drawn(seed, num=12 - num_liars)
    combined = rule(np.vstack([lie(kind, honest, num_liars, seed), honest]), np.ones(12))
    # Krum selects whole updates, so the bound is the spread of honest ones and not each coordinate's range.
    spread = np.linalg.norm(honest[:, None] - honest, axis=2).max()
    assert np.linalg.norm(combined - honest.mean(axis=0)) <= spread


def test_the_mean_does_not_bear_one() -> None:
    honest = drawn(0, num=11)
    combined = made("mean")(np.vstack([lie("huge", honest, 1, 0), honest]), np.ones(12))
    assert np.abs(combined).max() > 1e37


@RULE
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_is_refused(name: str, bad: float) -> None:
    updates = drawn(0)
    updates[4, 2] = bad
    with pytest.raises(InputError, match="rows 4,"):
        made(name)(updates, np.ones(12))
    weights = np.ones(12)
    weights[4] = 0
    assert np.isfinite(made(name)(updates, weights)).all()


@RULE
def test_only_the_mean_listens_to_weights(name: str) -> None:
    updates, weights = drawn(0), np.arange(1.0, 13.0)
    same = np.array_equal(made(name)(updates, weights), made(name)(updates, np.ones(12)))
    assert same == (name != "mean")


@RULE
def test_too_few_replies_are_refused_and_just_enough_are_not(name: str) -> None:
    rule = made(name)
    least = rule.min_replies
    assert rule(drawn(0, num=least), np.ones(least)).shape == (5,)
    assert name == "mean" or rule.max_byzantine(least) >= 1
    with pytest.raises(InputError, match=rf"{least - 1} replies .* needs at least {least}; wait"):
        rule(drawn(0, num=least - 1), np.ones(least - 1))
    with pytest.raises(InputError, match=rf"{least - 1} replies"):
        rule(drawn(0, num=least), np.array([0.0] + [1.0] * (least - 1)))


@RULE
def test_updates_may_be_empty_of_numbers(name: str) -> None:
    assert made(name)(np.zeros((12, 0), dtype=np.float32), np.ones(12)).shape == (0,)


@RULE
def test_memory_does_not_grow_with_the_length(name: str) -> None:
    """Beyond the result: blocks, where a copy of the updates would take 32 MB and one in float64 64 MB."""
    num, dim = 16, 500_000
    updates = np.zeros((num, dim), dtype=np.float32)
    updates[np.arange(num), np.arange(num)] = 1 + np.arange(num)
    rule = made(name)
    tracemalloc.start()
    rule(updates, np.ones(num))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 4 * dim + (20 << 20)


def test_names_and_options() -> None:
    assert list(RULES) == list(OPTIONS)
    assert rule_named("clip_to_median_norm", {"rule": "median"}) == rule_named(
        "clip_to_median_norm", {"rule": {"name": "median"}}
    )


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("krum", {}, "name is 'krum', expected one of mean, median"),
        ("mean", {"share": 0.1}, "the rule mean has no option 'share', it takes none"),
        ("trimmed_mean", {"shar": 0.1}, "the rule trimmed_mean has no option 'shar', expected only share"),
        ("multi_krum", {}, "the rule multi_krum needs the option 'num_byzantine'"),
        ("trimmed_mean", {"share": 0.7}, "share is 0.7"),
        ("clip_to_median_norm", {}, "needs the option 'rule'"),
        ("leave_out_long", {"rule": "mean", "times": 0.5}, "times is 0.5"),
        ("clip_to_median_norm", {"rule": 3}, "rule of clip_to_median_norm is 3"),
        ("clip_to_median_norm", {"rule": {"share": 0.2}}, "expected a name or a table with a name"),
        ("clip_to_median_norm", {"rule": {"name": "median", "share": 0.2}}, "median has no option 'share'"),
        ("clip_to_median_norm", {"rule": "multi_krum"}, "multi_krum needs the option 'num_byzantine'"),
    ],
)
def test_bad_names_and_options(name: str, options: dict[str, object], words: str) -> None:
    with pytest.raises(InputError, match=words):
        rule_named(name, options)

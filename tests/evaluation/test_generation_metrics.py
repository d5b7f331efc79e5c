from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cotune.errors import InputError
from cotune.evaluation.generation_metrics import GenerationMetrics, aggregate_generations

ISSUE_KEYS = set(
    """mode schedule num_tokens token_ids text sources M consult_rate disagree_rate bytes_down_per_token
bytes_up_per_token wasted_cloud_steps cloud_ms_per_token device_ms_per_token stall_ms_per_token tokens_per_s
certificate_misses""".split()  # noqa: SIM905
)


def counted(num_tokens: int = 4, **changes: Any) -> GenerationMetrics:
    """A generation of `num_tokens` tokens, the last one changed by the device."""
    values: dict[str, Any] = {
        "mode": "integration",
        "schedule": "optimistic",
        "answer": "correction",
        "seed": 3,
        "token_ids": list(range(num_tokens)),
        "text": "x" * num_tokens,
        "tokens": ["x"] * num_tokens,
        "sources": (["cloud"] * num_tokens)[:-1] + ["device"] * bool(num_tokens),
        "consulted": [(num_tokens - index) % 2 == 1 for index in range(num_tokens)],
        "blocking_trips": 1,
        "bytes_down": 4000,
        "bytes_up": 400,
        "wasted_cloud_steps": 3,
        "cloud_s": 0.02,
        "device_s": 0.004,
        "stall_s": 0.05,
        "wall_s": 0.1,
        "certificate_misses": 2,
    }
    return GenerationMetrics.from_counts(**(values | changes))


def test_rates_by_hand() -> None:
    metrics = counted()
    assert metrics.num_tokens == 4
    assert metrics.M == 0.25
    assert metrics.consult_rate == 0.5
    assert metrics.disagree_rate == 0.25
    assert (metrics.bytes_down_per_token, metrics.bytes_up_per_token) == (1000.0, 100.0)
    assert metrics.cloud_ms_per_token == pytest.approx(5.0)
    assert metrics.device_ms_per_token == pytest.approx(1.0)
    assert metrics.stall_ms_per_token == pytest.approx(12.5)
    assert metrics.tokens_per_s == pytest.approx(40.0)


def test_keys_of_the_issue_and_round_trip_through_json() -> None:
    metrics = counted()
    record = metrics.to_dict()
    assert ISSUE_KEYS | {"consulted", "answer", "tokens", "seed", "late", "drafted", "drafts_kept"} == set(record)
    assert GenerationMetrics.from_dict(json.loads(json.dumps(record))) == metrics


def test_nothing_generated() -> None:
    metrics = counted(0, blocking_trips=0, wall_s=0.0)
    assert (metrics.M, metrics.consult_rate, metrics.tokens_per_s, metrics.token_ids) == (0.0, 0.0, 0.0, ())
    assert aggregate_generations([metrics]).tokens_per_s == 0.0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sources": ("cloud",)}, "sources has 1 entries, expected num_tokens = 4"),
        ({"sources": ("cloud", "cloud", "cloud", "moon")}, "expected one of 'cloud', 'device'"),
        ({"consulted": (False,) * 4}, r"sources\[3\] is 'device' and consulted\[3\] is false"),
        ({"M": -0.1}, "M is -0.1, expected a number at least 0"),
        ({"disagree_rate": 1.1}, "disagree_rate is 1.1"),
        ({"text": 7}, r"text is 7 \(int\), expected a string"),
        ({"tokens_per_s": float("inf")}, "tokens_per_s is inf"),
        ({"num_tokens": 4.0}, "num_tokens is 4.0"),
        ({"late": (1, 4)}, r"late is \[1, 4\], expected positions of 4 tokens"),
        ({"drafts_kept": 1}, "drafts_kept is 1, expected at most drafted = 0"),
    ],
)
def test_says_what_is_wrong(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        dataclasses.replace(counted(), **changes)


def test_tokens_take_time() -> None:
    with pytest.raises(InputError, match=r"wall_s is 0\.0 for 4 tokens"):
        counted(wall_s=0.0)


def test_dict_with_missing_or_unknown_keys() -> None:
    record = counted().to_dict()
    with pytest.raises(InputError, match="unknown keys 'speed'"):
        GenerationMetrics.from_dict(record | {"speed": 1})
    for name in ("late", "drafted", "drafts_kept"):  # records of earlier versions have none
        del record[name]
    assert GenerationMetrics.from_dict(record) == counted()
    del record["M"]
    with pytest.raises(InputError, match="generation lacks 'M'"):
        GenerationMetrics.from_dict(record)


def test_late_and_drafted_tokens_add_up() -> None:
    both = aggregate_generations([counted(late=[2], drafted=9, drafts_kept=4), counted(drafted=1, drafts_kept=1)])
    assert (both.num_late, both.drafted, both.drafts_kept) == (1, 10, 5)


def test_aggregate_by_hand() -> None:
    # 4 tokens in 0.1 s with 1 trip, and 12 tokens in 0.1 s with 1 trip: 16 tokens in 0.2 s with 2 trips.
    both = aggregate_generations([counted(4), counted(12)])
    assert (both.num_generations, both.num_tokens) == (2, 16)
    assert pytest.approx(2 / 16) == both.M
    assert both.tokens_per_s == pytest.approx(80.0)
    assert both.bytes_down_per_token == pytest.approx(8000 / 16)
    assert (both.wasted_cloud_steps, both.certificate_misses) == (6, 4)
    assert json.loads(json.dumps(both.to_dict()))["schedule"] == "optimistic"


def test_aggregate_says_what_is_wrong() -> None:
    with pytest.raises(InputError, match="at least one generation"):
        aggregate_generations([])
    with pytest.raises(InputError, match=r"blocking.*expected one of a kind"):
        aggregate_generations([counted(), counted(schedule="blocking")])


@given(st.lists(st.integers(1, 30), min_size=1, max_size=6))
def test_aggregate_equals_one_generation_with_all_the_totals(lengths: list[int]) -> None:
    parts = [counted(length, wall_s=0.01 * length + 0.1) for length in lengths]
    together = aggregate_generations(parts)
    total = sum(lengths)
    assert together.consult_rate == pytest.approx(sum(sum(part.consulted) for part in parts) / total)
    assert together.disagree_rate == pytest.approx(len(lengths) / total)
    assert together.bytes_up_per_token == pytest.approx(400 * len(lengths) / total)
    assert together.tokens_per_s == pytest.approx(total / sum(0.01 * length + 0.1 for length in lengths))
    assert pytest.approx(together.M) == aggregate_generations(parts[::-1]).M

from __future__ import annotations

import math

import pytest

from cotune.cli.memory_size import parse_bytes
from cotune.errors import InputError
from cotune.evaluation.method_cost import CHECKPOINTED, METHODS, MethodSettings
from cotune.evaluation.model_shape import KNOWN_SHAPES
from cotune.evaluation.plan import PREFERENCE, format_bytes, make_plan
from cotune.evaluation.workload import Workload

SHAPE = KNOWN_SHAPES["qwen2.5-0.5b"]
EVERYTHING = [(method, chunked) for method in METHODS for chunked in (False, True)]


def test_every_way_to_tune_has_a_place_in_the_order() -> None:
    ways = {(method, False) for method in METHODS if method != "inference"}
    assert set(PREFERENCE) == ways | {(method, True) for method in CHECKPOINTED}
    assert len(PREFERENCE) == len(set(PREFERENCE))


def test_what_fits_and_what_is_best_fall_with_the_memory() -> None:
    best = {}
    for memory in ("20GB", "4GB", "2.7GB", "1.2GB"):
        plan = make_plan(SHAPE, Workload(), MethodSettings(), memory=parse_bytes(memory, "memory"), flops_per_s=1e11)
        for row in plan.rows:
            assert row.fits is (row.cost.peak + plan.runtime <= plan.memory)
            assert row.step_s == row.cost.flops / 1e11
        found = plan.best(EVERYTHING)
        assert found is not None
        best[memory] = (found.cost.method, found.cost.has_checkpoints)
    assert best["20GB"] == ("full", False) and best["1.2GB"] == ("side", False)
    ranks = [PREFERENCE.index(best[memory]) for memory in best]
    assert ranks == sorted(ranks) and len(set(ranks)) == 4


def test_only_what_is_offered_is_the_best() -> None:
    plan = make_plan(SHAPE, Workload(), MethodSettings(), memory=20 * 10**9)
    lora = plan.best([("lora", False), ("side", False)])
    assert lora is not None and lora.cost.method == "lora" and lora.step_s is None
    assert plan.best([]) is None


def test_too_little_for_anything_says_the_least() -> None:
    with pytest.raises(InputError, match=r"no method fits 100 MB: the least is \d+ MB, for side"):
        make_plan(SHAPE, Workload(), MethodSettings(), memory=10**8)
    least = make_plan(SHAPE, Workload(), MethodSettings(), memory=10**9, runtime=0)
    need = min(row.cost.peak for row in least.rows)
    make_plan(SHAPE, Workload(), MethodSettings(), memory=need, runtime=0)
    with pytest.raises(InputError, match="no method fits"):
        make_plan(SHAPE, Workload(), MethodSettings(), memory=need - 1, runtime=0)


@pytest.mark.parametrize("rate", [0.0, -1.0, math.nan, math.inf])
def test_impossible_rates(rate: float) -> None:
    with pytest.raises(InputError, match="flops_per_s is"):
        make_plan(SHAPE, Workload(), MethodSettings(), memory=10**10, flops_per_s=rate)


@pytest.mark.parametrize(
    ("num_bytes", "text"), [(999, "999 B"), (1000, "1 KB"), (999_600, "1000 KB"), (123_456_789, "123 MB")]
)
def test_bytes_are_written(num_bytes: int, text: str) -> None:
    assert format_bytes(num_bytes) == text

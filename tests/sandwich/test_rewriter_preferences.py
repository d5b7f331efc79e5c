"""Learning from pairs of rewrites: which pairs, what they cost and send, what is judged, kept, and done again."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from redactors import redactor_here
from rewriting_edges import GOOD_AND_BAD, Edge
from scripted_clouds import MemoryCloud

from cotune.errors import InputError
from cotune.evaluation import exact_match
from cotune.sandwich.budget import Budget, Purse
from cotune.sandwich.cloud_gate import AnswerCache, CloudGate
from cotune.sandwich.examples import PrivateExample
from cotune.sandwich.pipeline import Pipeline, PipelineConfig
from cotune.sandwich.rewrite_trials import AskedRequest, DrawConfig, Preference, Rewrite, Trial, Trials
from cotune.sandwich.rewriter_preferences import (
    PreferenceConfig,
    PreferredRewriter,
    prefer_rewrites,
    preferences_of,
)
from cotune.sandwich.sent_log import SentLog

EXAMPLES = [PrivateExample(f"{n}: where does Ann Lee live?", "Paris", ("Ann Lee",)) for n in range(4)]
CONFIG = PreferenceConfig(num_rounds=2, num_steps=2, x_rate=0.5)
REQUEST = AskedRequest(EXAMPLES[0], b"", "Ask:", Rewrite("As it is?", 0.8, 0.0, is_sent=True))


def answer(text: str) -> str:
    return "Paris" if text == "Town?" else "no idea"


def prefer(
    edge: Edge,
    cloud: MemoryCloud,
    *,
    config: PreferenceConfig = CONFIG,
    calls: int | None = None,
    folder: Path | None = None,
    share: float = 1.0,
    tried: tuple[Trial, ...] = (),
) -> PreferredRewriter | None:
    cache = None if folder is None else AnswerCache(folder)
    gate = CloudGate(cloud, purse=Purse(Budget(calls=calls)), cache=cache, sent=SentLog(None))
    draw = DrawConfig(num_samples=3, num_batch_examples=2)
    with redactor_here() as redactor:
        # One at a time, so that a budget ends at the same request each time.
        line = Pipeline(redactor, gate, PipelineConfig(model="m", num_parallel=1))
        trials = Trials(edge, line, EXAMPLES, exact_match, "Ask: {request}", draw, key=b"k")
        return prefer_rewrites(edge, trials, np.zeros(1), tried, config, first_round=2, margin=0.0, share=share)


def edge_that_learns() -> Edge:
    return Edge(greedy=("Weather?", "Town?"))


def shown(found: PreferredRewriter | None) -> PreferredRewriter:
    assert found is not None
    return found


def test_pairs_are_ranked_by_loss_and_leaks() -> None:
    good, same, bad, leaking = (
        Rewrite("good", 0.2, 0.0, is_sent=True),
        Rewrite("same", 0.22, 0.0, is_sent=True),
        Rewrite("bad", 0.6, 0.0, is_sent=True),
        Rewrite("leaking", 0.1, 0.5, is_sent=True),
    )
    trial = Trial(REQUEST, (bad, good, same, leaking))

    def pairs(**options: float) -> list[tuple[str, str]]:
        found = preferences_of(trial, **{"leak_weight": 1.0, "min_gap": 0.05, **options})
        assert all(each.read == "Ask:" for each in found)
        return [(each.better, each.worse) for each in found]

    # Scores 0.6, 0.2, 0.22 and 0.1 + 0.5 = 0.6: good and same are too close, and so are bad and leaking.
    assert pairs() == [("good", "bad"), ("same", "bad"), ("good", "leaking"), ("same", "leaking")]
    assert ("leaking", "bad") in pairs(leak_weight=0.0) and ("bad", "leaking") in pairs(leak_weight=2.0)
    assert ("good", "same") in pairs(min_gap=0.01) and pairs(min_gap=0.9) == []
    assert preferences_of(Trial(REQUEST, (good,)), leak_weight=1.0, min_gap=0.05) == []


def test_the_reference_is_read_once_where_supervision_ended() -> None:
    edge = Edge()
    trial = Trial(REQUEST, (Rewrite("Weather?", 1.0, 0.0, is_sent=True), Rewrite("Town?", 0.0, 0.0, is_sent=True)))
    found = shown(prefer(edge, MemoryCloud(answer), tried=(trial,)))
    # A pair of the supervised rounds, then two of each round, all read at x = 0 although x moved between them.
    assert edge.references == [(0.0, 2), (0.0, 4), (0.0, 4)] and found.num_pairs == 5
    assert edge.pairs[0] == Preference("Ask:", *GOOD_AND_BAD)
    # Two steps in each of two rounds, of Adam's rate each.
    assert found.x[0] == pytest.approx(-2.0, abs=1e-3)
    assert (found.loss, found.share_right) == (0.25, 1.0) and len(found.rounds) == 2


def test_what_is_written_greedily_is_judged_before_and_after() -> None:
    cloud = MemoryCloud(answer)
    found = shown(prefer(edge_that_learns(), cloud))
    before, after = found.before, found.after
    assert after is not None and (before.num_requests, before.num_accepted, before.loss) == (2, 0, 1.0)
    assert (after.num_requests, after.num_accepted, after.loss) == (2, 2, 0.0) and found.is_kept
    assert "accepted 0 -> 2 of 2, loss of rewrites 1.000 -> 0.000; kept" in found.to_text()
    told = found.to_json()
    assert told["after"]["num_accepted"] == 2 and told["num_pairs"] == 4 and "x" not in told
    # Nothing is asked twice, also without a cache: requests of two rounds and of the looks, and their rewrites.
    digests = [each.digest for each in cloud.requests]
    assert len(set(digests)) == len(digests) and not any(b"Ann" in each.payload for each in cloud.requests)


def test_pairs_that_do_harm_are_not_kept() -> None:
    found = shown(prefer(Edge(greedy=("Town?", "Weather?")), MemoryCloud(answer)))
    assert not found.is_kept and found.x.tolist() == [0.0] and "worse, so not kept" in found.to_text()


def test_a_leak_is_the_worse_half_of_a_pair_and_never_sent() -> None:
    edge = Edge(drawn=("a n n l e e?", "Weather?", ""), greedy=("a n n l e e?", "Weather?"))
    cloud = MemoryCloud(answer)
    found = shown(prefer(edge, cloud))
    assert {(each.better, each.worse) for each in edge.pairs} == {("Weather?", "a n n l e e?")}
    assert not any(b"a n n" in each.payload for each in cloud.requests)
    assert found.after is not None and (found.before.num_leaks, found.before.leak) == (2, 1.0)
    # No loss is smaller, but the leak is gone.
    assert found.before.loss == found.after.loss == 1.0 and found.after.leak == 0 and found.is_kept
    assert prefer(edge, cloud, config=replace(CONFIG, leak_weight=0.0)) is not None and edge.pairs != []


def test_without_a_gap_nothing_is_learnt() -> None:
    edge = Edge()
    found = shown(prefer(edge, MemoryCloud(lambda text: "no idea")))
    assert found.num_pairs == 0 and found.loss is None and found.after is None and edge.pairs == []
    assert found.x.tolist() == [0.0] and "nothing was learnt from pairs" in found.to_text()


@pytest.mark.parametrize("calls", [0, 2, 3, 4, 5, 7])
def test_the_budget_holds_wherever_it_ends_and_going_on_pays_once(tmp_path: Path, calls: int) -> None:
    # Three calls for the first look, since both requests are rewritten alike; three for a round and two for another.
    cloud = MemoryCloud(answer)
    found = prefer(edge_that_learns(), cloud, calls=calls, folder=tmp_path)
    assert len(cloud.requests) <= calls and (found is None) == (calls < 3)
    if found is not None:
        # The last look asks what was asked before, so that it always has room where there is something to judge.
        assert found.ended_by_budget and found.is_kept == (found.after is not None) == (calls >= 5) == bool(found.x[0])
    whole = shown(prefer(edge_that_learns(), cloud, folder=tmp_path))
    digests = [each.digest for each in cloud.requests]
    assert len(set(digests)) == len(digests) == 8 and not whole.ended_by_budget and whole.is_kept


def test_pairs_that_could_not_be_judged_are_not_kept() -> None:
    edge = Edge(greedy=("Weather?", "Which town?"))
    found = shown(prefer(edge, MemoryCloud(answer), calls=8))
    assert found.num_pairs == 4 and found.after is None and not found.is_kept and found.x.tolist() == [0.0]
    assert found.ended_by_budget and "the budget ended before they were judged" in found.to_text()


def test_a_run_that_goes_on_ends_at_the_same_place(tmp_path: Path) -> None:
    runs: list[Any] = []
    cloud = MemoryCloud(answer)
    for _ in range(2):
        edge = Edge(greedy=("Weather?", "Which town?"))
        found = shown(prefer(edge, cloud, calls=14, folder=tmp_path, share=0.5))
        runs.append((found.to_json(), found.x.tolist(), len(cloud.requests)))
    # The share is 7 calls: three of the first look, three and one of the rounds; the last look may go beyond it.
    assert runs[0] == runs[1] and runs[0][2] == 8 and runs[0][0]["ended_by_budget"]
    assert runs[0][0]["after"]["loss"] == 1.0 and runs[0][0]["rounds"][1]["num_requests"] == 1


@pytest.mark.parametrize(
    "options", [{"num_rounds": 0}, {"beta": 0.0}, {"min_gap": 0.0}, {"leak_weight": -1.0}, {"x_rate": float("inf")}]
)
def test_settings_that_cannot_be_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=next(iter(options))):
        PreferenceConfig(**options)

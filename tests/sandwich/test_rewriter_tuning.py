"""Tuning the edge before the cloud: what is asked, accepted and learnt, what never leaves, what it costs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from redactors import redactor_here
from rewriting_edges import GOOD_AND_BAD, Edge
from scripted_clouds import MemoryCloud

from cotune.errors import InputError
from cotune.evaluation import exact_match
from cotune.sandwich.bilevel.problem import Vector
from cotune.sandwich.budget import Budget, Purse
from cotune.sandwich.cloud_gate import AnswerCache, CloudGate
from cotune.sandwich.examples import PrivateExample
from cotune.sandwich.fit import FitConfig, fit, project
from cotune.sandwich.pipeline import Pipeline, PipelineConfig, Rewriter
from cotune.sandwich.prompts.pool import PromptPool
from cotune.sandwich.rewrite_trials import DrawConfig
from cotune.sandwich.rewriter_preferences import PreferenceConfig
from cotune.sandwich.rewriter_tuning import RewriterConfig, tune_rewriter
from cotune.sandwich.sent_log import SentLog

EXAMPLES = [PrivateExample(f"{n}: where does Ann Lee live?", "Paris", ("Ann Lee",)) for n in range(4)]
DRAW = DrawConfig(num_samples=3, num_batch_examples=2)
CONFIG = RewriterConfig(num_rounds=2, draw=DRAW, num_steps=2, x_rate=0.5, max_share=1)


def answer(text: str) -> str:
    return "Paris" if text == "Town?" else "no idea"


def gate_of(cloud: MemoryCloud, calls: int | None = None, folder: Path | None = None) -> CloudGate:
    cache = None if folder is None else AnswerCache(folder)
    return CloudGate(cloud, purse=Purse(Budget(calls=calls)), cache=cache, sent=SentLog(None))


def tune(edge: Edge, gate: CloudGate, config: RewriterConfig = CONFIG, key: bytes = b"k"):  # type: ignore[no-untyped-def]
    with redactor_here() as redactor:
        pipeline = Pipeline(redactor, gate, PipelineConfig(model="m"))
        return tune_rewriter(edge, pipeline, np.zeros(1), EXAMPLES, exact_match, "Ask: {request}", config, key=key)


def test_rewrites_that_are_answered_better_are_accepted_and_learnt() -> None:
    edge, cloud = Edge(), MemoryCloud(answer)
    found = tune(edge, gate_of(cloud))
    first = found.rounds[0]
    # Two requests as they are, and two rewrites of each; the empty one is nothing to ask.
    assert (first.num_requests, first.num_rewrites, first.num_accepted, first.num_leaks) == (2, 4, 2, 0)
    assert (first.loss, first.best_loss) == (1.0, 0.0) and not found.ended_by_budget
    # Steps on what was accepted so far, two in each round; Adam moves by its rate.
    assert [len(each) for each in edge.learnt] == [2, 2, 4, 4] and found.x[0] == pytest.approx(-2.0, abs=1e-3)
    read, written = edge.learnt[0][0]
    assert written == "Town?" and read.startswith("Ask: ") and "Ann" not in read and "<PERSON_" in read
    assert not any(b"Ann" in each.payload for each in cloud.requests)
    assert found.to_json()["rounds"][0]["num_accepted"] == 2 and found.to_json()["preferences"] is None
    assert "4 of 4 requests had a better one among 8 rewrites" in found.to_text()


def test_nothing_is_learnt_where_no_rewrite_is_better() -> None:
    edge = Edge()
    found = tune(edge, gate_of(MemoryCloud(lambda text: "no idea")))
    assert found.x.tolist() == [0.0] and edge.learnt == [] and found.rounds[0].num_accepted == 0


def test_a_rewrite_with_a_marked_unit_is_never_sent() -> None:
    class Careless(Edge):
        def sample_after(self, x: Vector, prompts_as_text: Sequence[str], **_: object) -> list[str]:  # type: ignore[override]
            return ["a n n l e e?", "Town?", ""]

    cloud = MemoryCloud(answer)
    found = tune(Careless(), gate_of(cloud))
    assert found.rounds[0].num_leaks == 2 and found.rounds[0].num_rewrites == 2
    assert not any(b"a n n" in each.payload for each in cloud.requests)


@pytest.mark.parametrize("calls", [0, 2, 3, 5])
def test_a_budget_that_ends_keeps_what_was_learnt_and_going_on_pays_once(tmp_path: Path, calls: int) -> None:
    cloud = MemoryCloud(answer)
    found = tune(Edge(), gate_of(cloud, calls, tmp_path))
    assert found.ended_by_budget and len(cloud.requests) <= calls
    assert bool(found.rounds) == (calls >= 3) == bool(found.x[0])
    whole = tune(Edge(), gate_of(cloud, None, tmp_path))
    digests = [each.digest for each in cloud.requests]
    assert len(set(digests)) == len(digests) and len(whole.rounds) == 2


def test_it_leaves_a_share_of_the_budget_for_what_comes_after(tmp_path: Path) -> None:
    cloud, half = MemoryCloud(answer), replace(CONFIG, max_share=0.5)
    found = tune(Edge(), gate_of(cloud, 6, tmp_path), half)
    # Three calls are the first request and its two rewrites; then half of six is spent.
    assert len(cloud.requests) == 3 and found.ended_by_budget and found.rounds[0].num_requests == 1
    # Going on, answers that were paid for before count towards the share as they did then, and it ends at the same one.
    assert tune(Edge(), gate_of(cloud, 6, tmp_path), half).rounds == found.rounds and len(cloud.requests) == 3


def test_pairs_follow_within_the_whole_share() -> None:
    learns = replace(CONFIG, max_share=0.6, preferences=PreferenceConfig(num_rounds=1, num_steps=1, x_rate=1.0))
    assert learns.supervised_share == pytest.approx(0.4) and CONFIG.supervised_share == 1
    edge = Edge()
    found = tune(edge, gate_of(MemoryCloud(answer)), learns)
    assert found.preferences is not None and found.x.tolist() == found.preferences.x.tolist()
    # Two supervised rounds of two requests and one more; each request has one pair, the good question and the other.
    assert found.preferences.num_pairs == 6 and {(each.better, each.worse) for each in edge.pairs} == {GOOD_AND_BAD}
    assert found.x[0] == pytest.approx(-3.0, abs=1e-3) and found.preferences.is_kept
    assert "preferences 6 pairs" in found.to_text() and found.to_json()["preferences"]["num_pairs"] == 6


def test_its_calls_are_bounded_before_anything_is_sent() -> None:
    # Two rounds of two requests with three rewrites each; one round more, and one rewrite each before and after.
    learns = replace(CONFIG, preferences=PreferenceConfig(num_rounds=1, num_steps=1))
    assert CONFIG.most_calls(4, 1) == 2 * 2 * 4 and learns.most_calls(4, 1) == 3 * 2 * 4 + 2 * 3
    assert CONFIG.most_calls(1, 8) == 2 * (1 + 3 * 8)
    cloud = MemoryCloud(answer)
    tune(Edge(), gate_of(cloud), learns)
    assert len(cloud.requests) <= learns.most_calls(4, 1)
    with redactor_here() as redactor:
        line = Pipeline(redactor, CloudGate(cloud), PipelineConfig(model="m", max_questions=1))
        found = project(line, EXAMPLES, EXAMPLES[:1], PromptPool([""]), rewriter=learns)
    assert found.num_rewriter_calls == 30 and "rewriter up to 30 calls more" in found.to_text()


def test_in_a_fit_it_comes_first_and_within_the_same_budget(tmp_path: Path) -> None:
    cloud, seen = MemoryCloud(answer), list[int]()

    class Says:
        def rewrite(self, redacted: str) -> list[str]:
            return ["Town?"]

    def make(pipeline: Pipeline, examples: Sequence[PrivateExample], key: bytes) -> Rewriter:
        seen.append(len(examples))
        tune_rewriter(Edge(), pipeline, np.zeros(1), examples, exact_match, "{request}", CONFIG, key=key)
        return Says()

    with redactor_here() as redactor:
        found = fit(
            Pipeline(redactor, CloudGate(cloud), PipelineConfig(model="m", max_tokens=5)),
            EXAMPLES,
            EXAMPLES[:1],
            exact_match,
            variable=PromptPool([""]),
            budget=Budget(calls=40),
            folder=tmp_path,
            make_rewriter=make,
            config=FitConfig(certificate_share=0.25),
        )
    # The last of four is kept for the certificate; all that was sent is in one log and one account.
    assert seen == [3] and found.score == 1.0 and found.spent.calls == len(cloud.requests) <= 40
    assert found.leaks.num_leaked == 0 and found.leaks.num_units == 5


@pytest.mark.parametrize("options", [{"num_rounds": 0}, {"x_rate": 0.0}, {"margin": 1.0}, {"max_share": 0.0}])
def test_tunings_that_cannot_be_are_refused(options: dict[str, float]) -> None:
    with pytest.raises(InputError):
        RewriterConfig(**options)  # type: ignore[arg-type]

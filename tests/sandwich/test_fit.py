"""Fits: the pool toy's bilevel optimum, projections, budgets, resuming, and what is written down."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from crossing_edge import CONFIG, PROMPTS, TRAIN, VALIDATION, CrossingEdge, crossing_cloud, fit_crossing
from redactors import redactor_here
from scripted_clouds import MemoryCloud

from cotune.errors import BudgetError, InputError, RedactionError, RefusedError
from cotune.evaluation import exact_match
from cotune.sandwich.budget import Budget, Purse
from cotune.sandwich.cloud_gate import CloudGate
from cotune.sandwich.cost import Price
from cotune.sandwich.examples import PrivateExample
from cotune.sandwich.fit import FitConfig, fit, prepare_examples, project
from cotune.sandwich.pipeline import MergeJob, Pipeline, PipelineConfig
from cotune.sandwich.prompts.categorical import CategoricalPrompt
from cotune.sandwich.prompts.pool import PromptPool
from cotune.sandwich.prompts.race import RaceConfig
from cotune.sandwich.scripted_cloud import scripted_server
from cotune.sandwich.text_problem import Cell

NUM_CELLS = 2 * (len(TRAIN) + len(VALIDATION))


def with_constraint(constraint: str, **changes: Any) -> FitConfig:
    return replace(CONFIG, solve=replace(CONFIG.solve, constraint=constraint, **changes))


@pytest.mark.parametrize("constraint", ["cut", "penalty"])
def test_the_bilevel_optimum_of_the_toy_is_reached(tmp_path: Path, constraint: str) -> None:
    found = fit_crossing(crossing_cloud(), tmp_path, config=with_constraint(constraint, penalty=2.0))
    # At the optimum B is as good as A for itself: x = 1, and 5 times the tolerance further at most.
    assert found.prompt == PROMPTS[1] and 0.8 < found.x[0] < 1.15
    assert found.certificate is not None and found.certificate.gap <= 0.03
    assert found.certificate.num_examples == 2 and not found.certificate.holds and not found.is_sequential


def test_the_joint_problem_ends_where_no_prompt_stays(tmp_path: Path) -> None:
    found = fit_crossing(crossing_cloud(), tmp_path, config=with_constraint("none"))
    assert found.x[0] == pytest.approx(2, abs=0.05)
    assert found.certificate is not None and found.certificate.gap == pytest.approx(0.2, abs=0.02)


def test_alternating_goes_on_to_the_worse_prompt() -> None:
    """On paper: from B to x = 2, there A is better for itself, and under A to x = 3, where F is 0.5 and not 0.2."""
    edge, x, letter = CrossingEdge(), 0.0, "B"
    for _ in range(3):
        x = 2.0 if letter == "B" else 3.0  # argmin F(., letter)
        letter = min("AB", key=lambda each: 0.4 if each == "A" else 0.2 + 0.2 * x)
    assert (x, letter) == (3.0, "A") and edge.start().size == 1


def test_each_cell_is_paid_once_and_nothing_marked_leaves(tmp_path: Path) -> None:
    cloud = crossing_cloud()
    found = fit_crossing(cloud, tmp_path)
    assert len({request.digest for request in cloud.requests}) == len(cloud.requests) == found.spent.calls == NUM_CELLS
    shares = dict.fromkeys(("leak_rate", "leak_fuzzy", "any_leak"), 0.0)
    assert found.leaks.to_json() == {
        "units": 8, "requests": 12, "leak_words": 0, **shares, **{f"{name}_own": 0.0 for name in shares}}  # fmt: skip
    assert "Ann" not in (tmp_path / "sent.jsonl").read_text()
    shown = json.loads((tmp_path / "result.json").read_text())
    assert shown["prompt"] == PROMPTS[1] and shown["certificate"]["num_examples"] == 2
    lines = (tmp_path / "progress.jsonl").read_text().splitlines()
    assert len(lines) == len(found.history) and json.loads(lines[0])["calls"] > 0
    text = found.to_text()
    assert "n = 2" in text and "24 calls" in text and "0.00% of 8" in text
    assert (tmp_path / "redaction.secret").stat().st_mode & 0o777 == 0o600


def test_going_on_costs_nothing_and_gives_the_same(tmp_path: Path) -> None:
    first = fit_crossing(crossing_cloud(), tmp_path)
    cloud = crossing_cloud()
    again = fit_crossing(cloud, tmp_path, resume=True)
    assert cloud.requests == [] and again.spent == first.spent
    assert (again.prompt, again.x[0], again.history) == (first.prompt, first.x[0], first.history)


def test_placeholders_depend_on_the_secret_and_on_nothing_before(tmp_path: Path) -> None:
    with redactor_here() as redactor:
        pipeline = Pipeline(redactor, CloudGate(crossing_cloud()), PipelineConfig(model="m"))
        sent = []
        for key in (b"a", b"a", b"b"):
            redactor.request().redact("ann@example.org")
            sent.append([str(each.prepared.questions) for each in prepare_examples(pipeline, TRAIN, key)])
    assert sent[0] == sent[1] != sent[2]


def test_in_parallel_each_example_is_drafted_once_for_all_prompts() -> None:
    class Drafts:
        def draft(self, request: str) -> str:
            return f"draft of {request}"

    config = PipelineConfig(model="m", mode="parallel")
    with redactor_here() as redactor:
        pipeline = Pipeline(redactor, CloudGate(crossing_cloud()), config, drafter=Drafts())
        (example, *_) = prepare_examples(pipeline, TRAIN, b"k")
    assert Cell(example, ("a",)).job == MergeJob(TRAIN[0].request, ("a",), f"draft of {TRAIN[0].request}")


def test_a_failure_on_the_way_is_gone_on_from(tmp_path: Path) -> None:
    whole = fit_crossing(crossing_cloud(), tmp_path / "whole")
    cloud = crossing_cloud([RefusedError(401, "who are you?")])
    with pytest.raises(RefusedError):
        fit_crossing(cloud, tmp_path / "broken")
    found = fit_crossing(cloud, tmp_path / "broken", resume=True)
    assert found.x[0] == whole.x[0]
    assert len(cloud.requests) - found.spent.calls == 0


@pytest.mark.parametrize(("calls", "num_searched"), [(3, 0), (17, 4), (20, 5)])
def test_a_budget_is_never_exceeded_and_what_was_found_is_kept(tmp_path: Path, calls: int, num_searched: int) -> None:
    cloud = crossing_cloud()
    if calls == 3:  # not even one look
        with pytest.raises(BudgetError):
            fit_crossing(cloud, tmp_path, Budget(calls=calls))
    else:
        found = fit_crossing(cloud, tmp_path, Budget(calls=calls))
        assert found.num_searched == num_searched and found.reason == "steps"
        assert f"{num_searched} examples" in found.to_text()
    assert len(cloud.requests) <= calls
    more = fit_crossing(cloud, tmp_path, Budget(calls=NUM_CELLS), resume=True)
    assert more.certificate is not None and len(cloud.requests) == NUM_CELLS


def test_a_projection_sends_nothing_and_is_not_exceeded(tmp_path: Path) -> None:
    cloud = crossing_cloud()
    with redactor_here() as redactor:
        gate = CloudGate(cloud, price=Price(usd_per_million_in=1, usd_per_million_out=10))
        pipeline = Pipeline(redactor, gate, PipelineConfig(model="m", max_tokens=5))
        pool = PromptPool(PROMPTS)
        before = project(pipeline, TRAIN, VALIDATION, pool, budget=Budget(usd=1e-6), folder=tmp_path)
        assert cloud.requests == [] and before.num_cells == before.at_most.calls == NUM_CELLS
        assert "usd would be" in before.lacking and "ends early" in before.to_text()
        found = fit_crossing(cloud, tmp_path)
        after = project(pipeline, TRAIN, VALIDATION, pool, budget=Budget(calls=1), folder=tmp_path)
    assert found.spent.tokens <= before.at_most.tokens and before.likely.tokens < before.at_most.tokens
    assert after.num_paid == NUM_CELLS and after.at_most.calls == 0 and after.lacking == ""


def test_without_an_edge_the_prompt_is_chosen_first(tmp_path: Path) -> None:
    cloud = MemoryCloud()
    cloud.under = {"Good.": "Paris", "Bad.": "no idea"}
    train = [PrivateExample(f"{n}: the capital?", "Paris") for n in range(8)]
    with redactor_here() as redactor:
        pipeline = Pipeline(redactor, CloudGate(cloud), PipelineConfig(model="m", max_tokens=5))
        found = fit(
            pipeline,
            train,
            train[:2],
            exact_match,
            variable=PromptPool(["Bad.", "Good."]),
            budget=Budget(),
            folder=tmp_path,
        )
    assert found.prompt == "Good." and found.score == 1.0 and found.start_score == 0.0 and found.is_sequential
    assert not found.is_merging and found.merged_score is None and found.plain_score is None


@pytest.mark.parametrize(
    ("says", "always", "kept", "scores"),
    [
        ("f", False, True, (1.0, 1.0, 0.0)),  # right where the cloud is wrong
        ("no", False, False, (0.0, 0.0, 0.0)),  # no better: nothing is cheaper
        ("no", True, True, (0.0, 0.0, 0.0)),
    ],
)
def test_an_edge_behind_the_cloud_stays_where_it_is_better(
    tmp_path: Path, says: str, always: bool, kept: bool, scores: tuple[float, ...]
) -> None:
    class Says(CrossingEdge):
        def write(self, x: Any, jobs: Any) -> list[str]:
            return [says for _ in jobs]

    found = fit_crossing(crossing_cloud(), tmp_path, edge=Says(), config=replace(CONFIG, always_merges=always))
    assert found.is_merging == kept and (found.score, found.merged_score, found.plain_score) == scores
    assert found.spent.calls == NUM_CELLS, "the answers to compare with were paid for"
    assert f"edge        {'kept' if kept else 'left out, as it is not better'}: with" in found.to_text()


def test_an_edge_that_is_right_on_what_it_learnt_from_alone_is_left_out(tmp_path: Path) -> None:
    cloud = MemoryCloud()
    cloud.under = dict.fromkeys(PROMPTS, "no idea")

    class Remembers(CrossingEdge):
        """One number for each example, which is right once it has learnt from that one."""

        places: ClassVar = {each.request: place for place, each in enumerate((*TRAIN, *VALIDATION))}
        targets: ClassVar = {each.request: each.target for each in (*TRAIN, *VALIDATION)}

        def start(self) -> Any:
            return np.zeros(len(self.places))

        def losses(self, x: Any, cells: Any) -> Any:
            return np.full(len(cells), 0.5)

        def gradient(self, x: Any, cells: Any, weights: Any, step: int) -> Any:
            slope = self.start()
            slope[[self.places[cell.example.source.request] for cell in cells]] = -1.0
            return self.losses(x, cells), slope

        def write(self, x: Any, jobs: Any) -> list[str]:
            return [self.targets[job.request] if x[self.places[job.request]] > 0 else "no" for job in jobs]

    found = fit_crossing(cloud, tmp_path, edge=Remembers())
    assert (found.is_merging, found.merged_score, found.plain_score, found.score) == (False, 0.0, 0.0, 0.0)


def test_an_edge_that_spoils_right_answers_is_left_out(tmp_path: Path) -> None:
    cloud = MemoryCloud()
    cloud.under = dict.fromkeys(PROMPTS, "f")
    found = fit_crossing(cloud, tmp_path)
    assert found.is_merging is False and found.merged_score == found.plain_score == found.score == 1.0

    class Spoils(CrossingEdge):
        def write(self, x: Any, jobs: Any) -> list[str]:
            return ["no" for _ in jobs]

    found = fit_crossing(cloud, tmp_path / "other", edge=Spoils())
    assert (found.is_merging, found.score, found.merged_score, found.plain_score) == (False, 1.0, 0.0, 1.0)
    assert json.loads((tmp_path / "other" / "result.json").read_text())["is_merging"] is False


def test_a_race_leaves_the_good_prompt_and_asks_less(tmp_path: Path) -> None:
    cloud = MemoryCloud()
    cloud.under = {"Good.": "Paris", **{f"Bad {n}.": "no idea" for n in range(5)}}
    train = [PrivateExample(f"{n}: the capital?", "Paris") for n in range(12)]
    with redactor_here() as redactor:
        pipeline = Pipeline(redactor, CloudGate(cloud), PipelineConfig(model="m", max_tokens=5))
        found = fit(
            pipeline,
            train,
            [PrivateExample(f"{n}: a town?", "Paris") for n in range(2)],
            exact_match,
            variable=PromptPool([*[*cloud.under][1:], "Good."]),
            budget=Budget(),
            folder=tmp_path,
            config=FitConfig(race=RaceConfig(num_left=1)),
        )
    assert found.race is not None and found.race.left == ("Good.",) and found.race.num_examples == 4
    assert (found.prompt, found.score, found.start_score) == ("Good.", 1.0, 0.0)
    # 6 prompts on 4 examples in the race, then one prompt on the others, and the first one on 2 to compare with.
    assert found.spent.calls == 6 * 4 + (12 - 4) + 2 + 2 and "1 prompts left after 4 examples" in found.to_text()
    with pytest.raises(InputError, match="no pool"):
        variable = CategoricalPrompt([["a", "b"]])
        fit_crossing(cloud, tmp_path / "x", variable=variable, config=FitConfig(race=RaceConfig(num_left=1)))


def test_another_run_is_not_mixed_in(tmp_path: Path) -> None:
    fit_crossing(crossing_cloud(), tmp_path)
    with pytest.raises(InputError, match="holds a run already"):
        fit_crossing(crossing_cloud(), tmp_path)
    with pytest.raises(InputError, match="other examples, prompts or settings"):
        fit_crossing(crossing_cloud(), tmp_path, resume=True, variable=PromptPool(["x"]))
    other = CrossingEdge()
    other.name = "crossing, with other settings"
    with pytest.raises(InputError, match="other examples, prompts or settings"):
        fit_crossing(crossing_cloud(), tmp_path, resume=True, edge=other)
    fit_crossing(crossing_cloud(), tmp_path, resume=True)


def test_too_few_examples_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="at least one of each"):
        fit_crossing(crossing_cloud(), tmp_path, config=replace(CONFIG, certificate_share=0.99))


def test_a_prompt_with_something_private_sends_nothing(tmp_path: Path) -> None:
    cloud = crossing_cloud()
    with pytest.raises(RedactionError):
        fit_crossing(cloud, tmp_path, variable=PromptPool(["Write to ann@example.org."]))
    assert cloud.requests == []


CHILD = """
import sys
from pathlib import Path
from crossing_edge import *
from cotune.sandwich.openai_cloud import OpenAiCloud
fit_crossing(OpenAiCloud(sys.argv[1]), Path(sys.argv[2]), Budget(calls=40), resume=True)
"""


@pytest.mark.integration
@pytest.mark.skipif(os.name == "nt", reason="SIGKILL")
def test_a_run_that_is_killed_never_pays_twice(tmp_path: Path) -> None:
    """A process is killed with a request on its way; the next one finds what came, and counts what was on its way."""
    reached, release, given = threading.Event(), threading.Event(), list[str]()

    def answer(body: Mapping[str, Any]) -> str:
        if len(given) >= 9 and not release.is_set():
            reached.set()
            release.wait(60)  # never answered: the process dies meanwhile
        given.append(json.dumps(body, sort_keys=True))
        return "AB"[PROMPTS.index(body["messages"][0]["content"])]

    folder, tests = tmp_path / "run", Path(__file__).parents[1]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tests), *sys.path])}
    with scripted_server(answer) as server:
        arguments = [sys.executable, "-c", CHILD, server.base_url, str(folder)]
        process = subprocess.Popen(arguments, env=environment, stderr=subprocess.PIPE)
        try:
            assert reached.wait(120)
        finally:
            process.send_signal(signal.SIGKILL)
            _, said = process.communicate(timeout=30)
        assert process.returncode == -signal.SIGKILL, said
        release.set()
        kept = len(list((folder / "answers").iterdir()))
        done = subprocess.run(arguments, env=environment, capture_output=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    num_sent = len(server.bodies)
    asked_again = num_sent - NUM_CELLS
    assert kept >= 5 and 1 <= asked_again <= 4  # at most what was on its way: four at once
    with Purse(journal=folder / "journal.jsonl") as purse:
        # What was reserved and had not left yet counts too: nobody can know.
        assert num_sent <= purse.spent.calls <= num_sent + 4

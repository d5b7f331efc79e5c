"""The edge learns once more: steps by hand, honest folds, the best look, and what a fit makes of it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from crossing_edge import CONFIG, PROMPTS, TRAIN, VALIDATION, CrossingEdge, crossing_cloud, fit_crossing
from redactors import redactor_here
from scripted_clouds import MemoryCloud

from cotune.errors import InputError
from cotune.sandwich.bilevel.step_rules import AdamRule, PlainRule
from cotune.sandwich.budget import Budget
from cotune.sandwich.cloud_gate import CloudGate
from cotune.sandwich.fit import prepare_examples
from cotune.sandwich.pipeline import Pipeline, PipelineConfig
from cotune.sandwich.refit import LearnConfig, RefitConfig, learning_steps, refit
from cotune.sandwich.text_problem import Cell

PLAIN = LearnConfig(make_rule=PlainRule, rate=0.25, num_batch_examples=3)


class Climbing(CrossingEdge):
    """Loss (x - 4)^2 / 2 on everything; its texts are right while x is between 0.9 and `spoils`."""

    def __init__(self, spoils: float = 99.0) -> None:
        self.spoils = spoils
        self.learnt: list[set[str]] = []
        self.wrote: list[tuple[set[str], set[str]]] = []

    def start(self) -> Any:
        self.learnt.append(set())
        return np.zeros(1)

    def losses(self, x: Any, cells: Sequence[Cell]) -> Any:
        return np.full(len(cells), (float(x[0]) - 4) ** 2 / 32)

    def gradient(self, x: Any, cells: Sequence[Cell], weights: Any, step: int) -> Any:
        self.learnt[-1] |= {cell.example.source.request for cell in cells}
        return self.losses(x, cells), (x - 4) * weights.sum()

    def write(self, x: Any, jobs: Sequence[Any]) -> list[str]:
        self.wrote.append(({job.request for job in jobs}, set(self.learnt[-1])))
        is_right = 0.9 <= x[0] <= self.spoils
        return ["f" if is_right and "train" in job.request else "F" if is_right else "no" for job in jobs]


@pytest.fixture
def cells() -> Iterator[list[Cell]]:
    with redactor_here() as redactor:
        pipeline = Pipeline(redactor, CloudGate(MemoryCloud()), PipelineConfig(model="m"))
        yield [Cell(each, ("cloud",)) for each in prepare_examples(pipeline, [*TRAIN, *VALIDATION], b"k")]


def exact(written: Sequence[str], cells: Sequence[Cell]) -> Any:
    return np.array([float(text == cell.example.source.target) for text, cell in zip(written, cells, strict=True)])


def test_steps_are_those_of_the_rule_by_hand(cells: list[Cell]) -> None:
    edge = Climbing()
    found = [float(x[0]) for x in islice(learning_steps(edge, edge.start(), cells, PLAIN), 3)]
    # x <- x + 0.25 (4 - x), and 10 is the longest slope.
    assert found == [1.0, 1.75, 2.3125]
    # Twelve cells in batches of five at most are three of four.
    edge.learnt.clear()
    next(islice(learning_steps(edge, edge.start(), cells, replace(PLAIN, num_batch_examples=5)), 2, None))
    assert len(edge.learnt[-1]) == 12
    far = LearnConfig(make_rule=PlainRule, rate=1.0, num_batch_examples=99, max_norm=2.0)
    assert [float(x[0]) for x in islice(learning_steps(edge, edge.start(), cells, far), 2)] == [2.0, 4.0]
    adam = replace(PLAIN, make_rule=AdamRule)
    assert next(learning_steps(edge, edge.start(), cells, adam))[0] == pytest.approx(0.25)
    with pytest.raises(InputError, match="nothing to train"):
        next(learning_steps(edge, edge.start(), [], PLAIN))


def test_each_example_is_judged_once_a_look_by_an_edge_that_never_saw_it(cells: list[Cell]) -> None:
    edge, seen = Climbing(), list[tuple[int, int]]()
    config = RefitConfig(num_steps=40, num_folds=3)
    found = refit(edge, cells, np.zeros(12), exact, PLAIN, config, on_step=lambda *told: seen.append(told))
    assert found is not None and (found.merged, found.plain, found.num_steps) == (1.0, 0.0, 10)
    assert len(edge.wrote) == 3 * 3 and all(not judged & learnt for judged, learnt in edge.wrote)
    everything = {cell.example.source.request for cell in cells}
    assert [len(set().union(*(judged for judged, _ in edge.wrote[look::3]))) for look in range(3)] == [12, 12, 12]
    assert edge.learnt[-1] == everything, "at the end from all"
    assert found.x[0] == pytest.approx(4 * (1 - 0.75**10))
    assert seen[-1] == (3 * 40 + 10, 160) and [done for done, _ in seen] == list(range(1, 131))


def test_it_learns_for_as_long_as_the_best_look_and_tells_where_none_is_better(cells: list[Cell]) -> None:
    # 0.75 after one step of eight ... 1.0 after one, 1.75 after two, 2.73 after four: the last two looks are spoilt.
    early = refit(Climbing(spoils=1.2), cells, np.zeros(12), exact, PLAIN, RefitConfig(num_steps=4))
    assert early is not None and (early.num_steps, early.merged) == (1, 1.0) and early.x[0] == 1.0
    never = refit(Climbing(spoils=0.5), cells, np.full(12, 0.5), exact, PLAIN, RefitConfig(num_steps=4))
    assert never is not None and never.merged == 0.0 < never.plain == 0.5


def test_two_cells_are_two_folds_and_one_is_too_few(cells: list[Cell]) -> None:
    edge = Climbing()
    found = refit(edge, cells[:2], np.zeros(2), exact, PLAIN, RefitConfig(num_steps=4))
    assert found is not None and len(edge.wrote) == 2 * 3
    assert refit(edge, cells[:1], np.zeros(1), exact, PLAIN, RefitConfig()) is None


@pytest.mark.parametrize(("changes", "told"), [({"num_steps": 2}, "at least 3"), ({"num_folds": 1}, "at least 2")])
def test_settings_that_cannot_be_are_refused(changes: dict[str, int], told: str) -> None:
    with pytest.raises(InputError, match=told):
        RefitConfig(**changes)


def test_a_fit_ships_a_refit_that_gains_more_and_certifies_it_on_what_it_never_saw(tmp_path: Path) -> None:
    """The search's x is right too; it learnt from validation alone, and folds say as much of all: no more gain."""
    edge, told = Climbing(), list[tuple[int, int]]()
    config = replace(CONFIG, refit=RefitConfig(num_steps=40), solve=replace(CONFIG.solve, num_steps=0))
    found = fit_crossing(crossing_cloud(), tmp_path, edge=edge, config=config, on_refit=lambda *step: told.append(step))
    # Without steps of the search its x is the start, whose texts are wrong.
    assert (found.is_merging, found.merged_score, found.plain_score, found.score) == (True, 1.0, 0.0, 1.0)
    assert (found.num_refit_steps, told[-1]) == (10, (4 * 40 + 10, 200))
    assert "then the edge learnt anew for 10" in found.to_text()
    held = {each.request for each in TRAIN[6:]}
    assert found.certificate is not None and found.certificate.num_examples == len(held) == 2
    assert not any(held & learnt for learnt in edge.learnt)
    assert any(judged == {each.request for each in VALIDATION} for judged, _ in edge.wrote)


def test_a_refit_at_which_another_prompt_is_better_is_left(tmp_path: Path) -> None:
    class Turning(Climbing):
        """Beyond x = 0.9, B is worse for itself than A."""

        def losses(self, x: Any, cells: Sequence[Cell]) -> Any:
            return np.array([0.9 if (cell.answers == ("B",)) == (x[0] > 0.9) else 0.1 for cell in cells])

    still = replace(CONFIG.solve, num_steps=0, x_rate=0.25)
    config = replace(CONFIG, refit=RefitConfig(num_steps=40), solve=still)
    found = fit_crossing(crossing_cloud(), tmp_path / "cut", edge=Turning(), config=config)
    assert (found.prompt, found.x[0], found.num_refit_steps, found.is_merging) == (PROMPTS[1], 0.0, 0, False)
    # The joint problem has no such bound.
    free = replace(config, solve=replace(still, constraint="none"))
    found = fit_crossing(crossing_cloud(), tmp_path / "none", edge=Turning(), config=free)
    assert found.num_refit_steps == 10 and found.is_merging


def test_a_refit_learns_from_what_waited_for_the_prompt(tmp_path: Path) -> None:
    """16 calls are four examples under both prompts, two of the certificate, and four more under the one chosen."""
    cloud = crossing_cloud()
    still = replace(CONFIG, solve=replace(CONFIG.solve, num_steps=0))
    found = fit_crossing(cloud, tmp_path, Budget(calls=16), edge=Climbing(), config=still)
    assert (found.reason, found.num_searched, len(cloud.requests)) == ("steps", 4, 16)
    assert found.num_refit_steps > 0 and found.merged_score == 1.0

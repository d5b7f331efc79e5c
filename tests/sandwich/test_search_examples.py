"""What a search looks at within a budget: counted by hand, never more than it pays for, the same when it goes on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from redactors import redactor_here
from scripted_clouds import MemoryCloud

from cotune.errors import BudgetError
from cotune.sandwich.budget import Budget, Purse
from cotune.sandwich.cloud_gate import AnswerCache, CloudGate
from cotune.sandwich.cost import Cost
from cotune.sandwich.examples import PrivateExample
from cotune.sandwich.fit import prepare_examples
from cotune.sandwich.pipeline import Pipeline, PipelineConfig
from cotune.sandwich.search_examples import SearchExamples, ask_rest, in_turn, search_examples
from cotune.sandwich.text_problem import AnswerTable, FitExample

PROMPTS = ["Prompt one.", "Prompt two.", "Prompt three."]


class Desk:
    """A cloud with a budget, and examples to ask it about."""

    def __init__(self, redactor: Any, budget: Budget, num_train: int, num_validation: int, **parts: Any) -> None:
        self.cloud = MemoryCloud()
        self.cloud.under = dict.fromkeys(PROMPTS, "yes")
        self.gate = CloudGate(self.cloud, purse=Purse(budget), **parts)
        pipeline = Pipeline(redactor, self.gate, PipelineConfig(model="m", max_tokens=5))
        plain = [PrivateExample(f"request {number}", "yes") for number in range(num_train + num_validation)]
        examples = prepare_examples(pipeline, plain, b"k")
        self.train, self.validation = examples[:num_train], examples[num_train:]
        self.table = AnswerTable(pipeline)

    def search(self, **changes: Any) -> SearchExamples:
        return search_examples(self.table, self.gate, PROMPTS, self.train, self.validation, **changes)

    def sizes(self, **changes: Any) -> tuple[int, int, int, int]:
        found = self.search(**changes)
        return len(found.train), len(found.validation), len(found.rest), len(self.cloud.requests)


@contextmanager
def desk(budget: Budget, num_train: int = 20, num_validation: int = 20, **parts: Any) -> Iterator[Desk]:
    with redactor_here() as redactor:
        yield Desk(redactor, budget, num_train, num_validation, **parts)


@pytest.mark.parametrize(
    ("budget", "changes", "expected"),
    [
        (Budget(), {}, (20, 20, 0, 0)),
        (Budget(calls=120), {}, (20, 20, 0, 0)),  # 40 x 3, and nothing asked to find that out
        # 95 of 100 calls: 3 n + (40 - n) <= 95 gives n = 27, after four examples under three prompts.
        (Budget(calls=100), {}, (14, 13, 13, 12)),
        (Budget(calls=60), {}, (5, 4, 31, 12)),  # 57: n = 8, but half of it is n = 9
        (Budget(calls=30), {}, (2, 2, 36, 12)),  # half of 28.5 is four examples, which is less than one prompt for all
        (Budget(calls=100), {"num_prompts": 6}, (6, 5, 29, 12)),  # 6 n + (40 - n) <= 95
        (Budget(calls=100), {"before": Cost(calls=40)}, (5, 4, 31, 12)),
    ],
)
def test_sizes_worked_by_hand(budget: Budget, changes: dict[str, Any], expected: tuple[int, ...]) -> None:
    with desk(budget) as here:
        assert here.sizes(**changes) == expected


def test_what_a_certificate_asks_is_left_for_it() -> None:
    with desk(Budget(calls=120), num_train=25) as here:
        held, here.train = here.train[:5], here.train[5:]
        # 114 less 15 for the five.
        assert here.sizes(held=held) == (15, 14, 11, 12)


def test_tokens_count_as_they_come_and_not_as_the_most() -> None:
    with desk(Budget()) as here:
        request = here.table.requests(PROMPTS[0], here.train[0])[0]
        most = here.gate.most(request).tokens
    # Each answer of this cloud takes 11 tokens, far below the most; so a budget of 40 x 3 x 12 pays for all.
    assert most > 12
    with desk(Budget(tokens=40 * 3 * 12)) as here:
        assert here.sizes() == (20, 20, 0, 12)
        assert here.gate.purse.spent.tokens == 12 * 11


@settings(max_examples=25, deadline=None)
@given(st.integers(12, 130), st.integers(1, 20), st.integers(1, 20))
def test_everything_it_plans_is_within_the_budget(calls: int, num_train: int, num_validation: int) -> None:
    with desk(Budget(calls=calls), num_train, num_validation) as here:
        found = here.search()
        looked = [*found.train, *found.validation]
        assert sorted(map(id, [*looked, *found.rest])) == sorted(map(id, [*here.train, *here.validation]))
        assert found.train and found.validation
        here.table.fill(PROMPTS, looked)
        ask_rest(here.table, PROMPTS, PROMPTS[1], [], found.rest)
        assert len(here.cloud.requests) <= calls
        known = sum(here.table.knows(PROMPTS[1], each) for each in found.rest)
        # What is left over is less than the spare part, or there is nothing more to ask.
        assert known == len(found.rest) or here.gate.purse.spent.calls == calls


def test_a_run_that_goes_on_splits_as_before(tmp_path: Any) -> None:
    def names(found: SearchExamples) -> list[list[str]]:
        return [[each.source.request for each in part] for part in (found.train, found.validation, found.rest)]

    cache = AnswerCache(tmp_path)
    with desk(Budget(calls=100), cache=cache) as here:
        first = names(here.search())
    with desk(Budget(calls=100), cache=cache) as here:
        here.gate.purse.settle(here.gate.purse.reserve(Cost()), Cost(calls=12))  # what the first run paid
        assert names(here.search()) == first and here.cloud.requests == []


def test_no_room_for_the_first_examples() -> None:
    with desk(Budget(calls=7)) as here, pytest.raises(BudgetError):
        here.search()


def test_in_turn_keeps_proportions_and_orders() -> None:
    with desk(Budget(), 4, 6) as here:
        order = in_turn(here.train, here.validation)
        marks = "".join("t" if each in here.train else "v" for each in order)
        assert marks == "ttvvvtvvtv" and [each for each in order if each in here.validation] == here.validation
        assert all(isinstance(each, FitExample) for each in order)

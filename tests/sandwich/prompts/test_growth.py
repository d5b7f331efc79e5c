"""Growing pools: who writes, what is shown and sent, who joins and leaves, what it costs, and going on."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from redactors import redactor_here

from cotune.errors import InputError
from cotune.evaluation import exact_match
from cotune.sandwich.bilevel.solve import SolveConfig
from cotune.sandwich.budget import Budget
from cotune.sandwich.chat import ChatAnswer, ChatRequest
from cotune.sandwich.cloud_gate import CloudGate
from cotune.sandwich.examples import PrivateExample
from cotune.sandwich.fit import FitConfig, FitResult, fit, project
from cotune.sandwich.pipeline import Pipeline, PipelineConfig
from cotune.sandwich.prompts.categorical import CategoricalPrompt
from cotune.sandwich.prompts.growth import GrowthConfig, prompt_of
from cotune.sandwich.prompts.pool import PromptPool
from cotune.sandwich.prompts.variable import PromptVariable

TRAIN = [PrivateExample(f"{n}: Ann Lee asks for the capital?", "Paris", ("Ann Lee",)) for n in range(12)]
JUDGED = [PrivateExample(f"{n}: a town?", "Paris") for n in range(2)]
POOL = ["Bad.", "Worse."]
GROWTH = GrowthConfig(num_new=2, num_examples=4, num_failures=2)
CONFIG = FitConfig(
    solve=SolveConfig(num_steps=8, refresh_every=2, grow_every=1, y_rate=0.5), growth=GROWTH, certificate_share=0
)


class WritingCloud:
    """Answers Paris under "Good." and nothing of use else; asked for an instruction it takes the next of `written`."""

    def __init__(self, written: Callable[[int], str] = lambda number: ("Good.", "Bad.")[number % 2]) -> None:
        self.requests: list[ChatRequest] = []
        self.reflections: list[str] = []
        self._written = written

    def send(self, request: ChatRequest, *, timeout_s: float) -> ChatAnswer:
        self.requests.append(request)
        system, user = (each["content"] for each in request.messages.value)
        if "Write a better instruction" in system:
            self.reflections.append(user)
            return ChatAnswer(text=self._written(len(self.reflections) - 1), tokens_in=50, tokens_out=5)
        return ChatAnswer(text="Paris" if system == "Good." else "no idea", tokens_in=10, tokens_out=1)


def grown(cloud: WritingCloud, folder: Path, config: FitConfig = CONFIG, **options: Any) -> FitResult:
    variable: PromptVariable = options.pop("variable", PromptPool(POOL))
    with redactor_here() as redactor:
        # One at a time, so that a budget ends at the same request each time.
        line = Pipeline(redactor, CloudGate(cloud), PipelineConfig(model="m", max_tokens=5, num_parallel=1))
        options = {"budget": Budget(), **options}
        return fit(line, TRAIN, JUDGED, exact_match, variable=variable, folder=folder, config=config, **options)


def test_a_written_prompt_joins_and_wins_and_the_pool_keeps_its_size(tmp_path: Path) -> None:
    cloud = WritingCloud()
    found = grown(cloud, tmp_path)
    assert (found.prompt, found.score, found.start_score) == ("Good.", 1.0, 0.0)
    first = found.growths[0]
    # Two were asked for, of which one stood in the pool; of three prompts the race leaves two, the leader among them.
    assert (first.leader, first.num_written, first.joined) == ("Bad.", 1, ("Good.",)) and first.left == ("Worse.",)
    # Then the leader fails nowhere, so that nobody is asked for another one.
    assert found.growths[-1].num_written == 0 and len(cloud.reflections) == 2
    assert "1 prompts written, 1 joined the pool and 1 left it" in found.to_text()
    shown = json.loads((tmp_path / "result.json").read_text())["growths"]
    assert shown[0]["joined"] == ["Good."]


def test_what_reflects_reads_redacted_requests_and_no_target_unless_it_is_allowed(tmp_path: Path) -> None:
    cloud = WritingCloud()
    found = grown(cloud, tmp_path / "a")
    one, other = cloud.reflections
    assert one.startswith("Instruction: Bad.") and one.count("Answer: no idea") == 2 and one != other
    assert "Ann" not in one and "Paris" not in one and found.leaks.num_leaked == 0
    # It counts like any other request: paid, written down, looked through for leaks.
    assert found.spent.calls == len(cloud.requests)
    assert "Write a better instruction" in (tmp_path / "a" / "sent.jsonl").read_text()
    grown(cloud, tmp_path / "b", replace(CONFIG, growth=replace(GROWTH, shows_targets=True)))
    assert "Wanted: Paris" in cloud.reflections[2]


def test_going_on_pays_for_nothing_twice_and_gives_the_same(tmp_path: Path) -> None:
    first = grown(WritingCloud(), tmp_path)
    cloud = WritingCloud()
    again = grown(cloud, tmp_path, resume=True)
    assert cloud.requests == [] and again.spent == first.spent
    assert (again.prompt, again.growths, again.history) == (first.prompt, first.growths, first.history)


@pytest.mark.parametrize("calls", [24, 27, 29, 34, 38])
def test_the_budget_holds_wherever_it_ends(tmp_path: Path, calls: int) -> None:
    cloud = WritingCloud()
    found = grown(cloud, tmp_path, budget=Budget(calls=calls))
    assert len(cloud.requests) <= calls and found.prompt in (*POOL, "Good.")
    num_before = len(cloud.requests)
    grown(cloud, tmp_path, budget=Budget(calls=200), resume=True)
    asked = [each.digest for each in cloud.requests]
    assert len(set(asked)) == len(asked) > num_before


def test_without_room_for_growth_the_search_goes_on_with_what_it_has(tmp_path: Path) -> None:
    # 8 calls answer the 4 examples that such a budget searches on, 2 are for prompts; then the race has no room.
    cloud = WritingCloud()
    found = grown(cloud, tmp_path, budget=Budget(calls=12))
    assert found.num_searched == 4
    assert found.reason == "steps" and len(cloud.reflections) == 2 and len(found.growths) == 1
    assert found.growths[0].ended_by_budget and found.score is not None and "no room" in found.to_text()


@pytest.mark.parametrize(
    "text", ["", "Write to ann@example.org.", "Answer about <PERSON_1234>.", "x" * 2000, "Bad.", '"Bad."']
)
def test_what_cannot_be_a_prompt_is_thrown_away(tmp_path: Path, text: str) -> None:
    found = grown(WritingCloud(lambda _: text), tmp_path)
    assert all(each.num_written == 0 and each.joined == () for each in found.growths)
    assert found.prompt in POOL


def test_a_prompt_is_cut_out_of_what_stands_around_it() -> None:
    assert prompt_of(' "Be brief." ') == "Be brief."
    assert prompt_of("Sure:\n```text\nBe brief.\nThink.\n```\nGood luck") == "Be brief.\nThink."


def test_the_dry_run_says_how_many_calls_growth_may_take(tmp_path: Path) -> None:
    with redactor_here() as redactor:
        line = Pipeline(redactor, CloudGate(WritingCloud()), PipelineConfig(model="m"))
        found = project(line, TRAIN, JUDGED, PromptPool(POOL), config=CONFIG)
    # Looks at 0, 2, 4 and 6, growth before the last three; each prompt once, then under 14 examples.
    assert CONFIG.solve.num_growths == 3 and found.num_growth_calls == 3 * 2 * 15
    assert "up to 90 calls more" in found.to_text()


def test_growth_that_cannot_be_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="a growth is asked for and the prompt variable is no pool"):
        grown(WritingCloud(), tmp_path, variable=CategoricalPrompt([["a", "b"]]))
    for options in ({"num_new": 0}, {"num_examples": 1}, {"max_prompts": 255}, {"max_chars": 0}):
        with pytest.raises(InputError):
            GrowthConfig(**options)  # type: ignore[arg-type]

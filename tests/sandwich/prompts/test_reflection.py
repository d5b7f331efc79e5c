"""Who writes prompts: another cloud over real HTTP, another model of the same one, the edge; money, books, privacy."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from redactors import DICTIONARY, redactor_here
from scripted_clouds import MemoryCloud
from tiny_models import tiny_backbone

from cotune.errors import InputError, RedactionError
from cotune.evaluation import exact_match
from cotune.ledger import EgressLedger
from cotune.models.adapters import LoraAdapter, LoraShape
from cotune.sandwich.account import Account
from cotune.sandwich.bilevel.problem import Vector
from cotune.sandwich.bilevel.solve import SolveConfig
from cotune.sandwich.budget import Budget, Purse
from cotune.sandwich.cloud_gate import CloudGate
from cotune.sandwich.cost import Cost, Price
from cotune.sandwich.detect import HereFinder
from cotune.sandwich.detector_table import DetectorSettings, build_detector
from cotune.sandwich.detectors.dictionary import parse_dictionary
from cotune.sandwich.edge_adapter import EdgeConfig, edge_adapter
from cotune.sandwich.examples import PrivateExample
from cotune.sandwich.finding import Finding
from cotune.sandwich.fit import FitConfig, FitResult, fit, project
from cotune.sandwich.openai_cloud import OpenAiCloud
from cotune.sandwich.pipeline import Pipeline, PipelineConfig
from cotune.sandwich.prompts.growth import GrowthConfig
from cotune.sandwich.prompts.pool import PromptPool
from cotune.sandwich.prompts.reflection import CloudReflection, EdgeReflection
from cotune.sandwich.redact import RedactedJson, Redactor
from cotune.sandwich.scripted_cloud import ScriptedServer, scripted_server

TRAIN = [PrivateExample(f"{n}: Ann Lee asks for the capital?", "Paris", ("Ann Lee",)) for n in range(6)]
JUDGED = [PrivateExample("a town?", "Paris")]
GROWTH = GrowthConfig(num_new=1, num_examples=4, num_failures=2)
CONFIG = FitConfig(
    solve=SolveConfig(num_steps=4, refresh_every=2, grow_every=1, y_rate=0.5), growth=GROWTH, certificate_share=0
)
PRICE = Price(usd_per_million_in=1000, usd_per_million_out=0)
OTHER_PRICE = Price(usd_per_million_in=0, usd_per_million_out=100_000)


def say(body: Mapping[str, Any]) -> str:
    return "Paris" if body["messages"][0]["content"] == "Good." else "no idea"


def memory_cloud() -> MemoryCloud:
    cloud = MemoryCloud(lambda text: "no idea")
    cloud.under["Good."] = "Paris"
    return cloud


@pytest.fixture
def servers() -> Iterator[tuple[ScriptedServer, ScriptedServer]]:
    with scripted_server(say) as answers, scripted_server(lambda body: "Good.") as reflects:
        yield answers, reflects


def grown(gate: CloudGate, folder: Path, redactor: Redactor | None = None, **options: Any) -> FitResult:
    options = {"budget": Budget(), "config": CONFIG, **options}
    with redactor or redactor_here() as redacts:
        line = Pipeline(redacts, gate, PipelineConfig(model="small", max_tokens=5, num_parallel=1))
        return fit(line, TRAIN, JUDGED, exact_match, variable=PromptPool(["Bad."]), folder=folder, **options)


def test_another_cloud_writes_under_the_same_books_at_its_own_price(
    tmp_path: Path, servers: tuple[ScriptedServer, ScriptedServer]
) -> None:
    answers, reflects = servers
    ledger = EgressLedger(None)
    with closing(OpenAiCloud(answers.base_url)) as cloud, closing(OpenAiCloud(reflects.base_url)) as other:
        found = grown(
            CloudGate(cloud, price=PRICE, ledger=ledger),
            tmp_path,
            reflection=CloudReflection(model="large", cloud=other, price=OTHER_PRICE),
            budget=Budget(usd=100, calls=60),
        )
    assert found.prompt == "Good." and found.score == 1.0
    (asked,) = [json.loads(body) for body in reflects.bodies]
    assert asked["model"] == "large" and "Write a better instruction" in asked["messages"][0]["content"]
    assert not any(b"Write a better" in body for body in answers.bodies)
    assert not any(b"Ann" in body for body in (*answers.bodies, *reflects.bodies))
    # One word out of the other cloud costs 0.1 dollars; words into the first one 0.001 each.
    parts = found.taken.cloud_by_kind
    assert parts["reflection"].usd == pytest.approx(0.1) and parts["reflection"].calls == 1
    assert parts["chat"].usd == pytest.approx(parts["chat"].tokens_in * 1e-3) and parts["chat"].tokens_in > 0
    assert found.spent.calls == len(answers.bodies) + 1 == found.taken.cloud.calls
    assert found.spent.usd == pytest.approx(parts["chat"].usd + 0.1)
    # All bytes of both are in the ledger, by kind, and in the log in which leaks are looked for.
    totals = ledger.totals()
    assert totals["reflection"] == {"count": 1, "bytes": len(reflects.bodies[0])}
    assert totals["chat"]["bytes"] == sum(map(len, answers.bodies))
    assert found.taken.bytes_out == totals["chat"]["bytes"] + totals["reflection"]["bytes"]
    sent = [json.loads(line)["payload"] for line in (tmp_path / "sent.jsonl").read_text().splitlines()]
    assert reflects.bodies[0].decode() in sent and len(sent) == len(set(answers.bodies)) + 1
    assert "reflection  1 calls of these" in found.to_text()
    assert found.to_json()["taken"]["cloud_by_kind"]["reflection"]["calls"] == 1


def test_what_it_reads_counts_as_a_leak_where_it_is_one(tmp_path: Path) -> None:
    other = MemoryCloud(lambda text: "Good.")
    with redactor_here(dictionary="TERM: nothing\n") as redactor:
        line = Pipeline(redactor, CloudGate(memory_cloud()), PipelineConfig(model="small", max_tokens=5))
        found = fit(
            line,
            [PrivateExample(f"{n}: the capital?", "Zanzibar", ("Zanzibar",)) for n in range(6)],
            JUDGED,
            exact_match,
            variable=PromptPool(["Bad."]),
            folder=tmp_path,
            budget=Budget(),
            reflection=CloudReflection(model="large", cloud=other),
            config=replace(CONFIG, growth=replace(GROWTH, shows_targets=True)),
        )
    # Only what went to the model that reflects held the targets.
    assert any("Wanted: Zanzibar" in each.messages.value[1]["content"] for each in other.requests)
    assert found.leaks.num_leaked == 6


def test_going_on_asks_nobody_again_and_knows_who_wrote(tmp_path: Path) -> None:
    other = MemoryCloud(lambda text: "Good.")
    first = grown(CloudGate(memory_cloud()), tmp_path, reflection=CloudReflection(model="large", cloud=other))
    again, silent = MemoryCloud(), MemoryCloud()
    reflection = CloudReflection(model="large", cloud=silent)
    found = grown(CloudGate(again), tmp_path, reflection=reflection, resume=True)
    assert again.requests == silent.requests == [] and len(other.requests) == 1
    assert (found.prompt, found.growths, found.spent) == (first.prompt, first.growths, first.spent)
    for changed in (None, CloudReflection(model="huge", cloud=silent)):
        with pytest.raises(InputError, match="other examples, prompts or settings"):
            grown(CloudGate(again), tmp_path, reflection=changed, resume=True)


@pytest.mark.parametrize("calls", [4, 5, 6, 7])
def test_the_budget_holds_over_both(tmp_path: Path, calls: int) -> None:
    # Four calls answer what the search looks at within such a budget; the fifth is for a prompt.
    cloud, other = memory_cloud(), MemoryCloud(lambda text: "Good.")
    reflection = CloudReflection(model="large", cloud=other)
    found = grown(CloudGate(cloud), tmp_path, reflection=reflection, budget=Budget(calls=calls))
    assert len(cloud.requests) + len(other.requests) == found.spent.calls <= calls
    assert len(other.requests) == (calls >= 5) and found.growths[0].ended_by_budget


@pytest.mark.parametrize("calls", range(9, 17))
def test_the_search_leaves_room_for_what_joins(tmp_path: Path, calls: int) -> None:
    cloud, other = memory_cloud(), MemoryCloud(lambda text: "Good.")
    reflection = CloudReflection(model="large", cloud=other)
    found = grown(CloudGate(cloud), tmp_path, reflection=reflection, budget=Budget(calls=calls))
    assert (found.reason, found.prompt, found.score) == ("steps", "Good.", 1.0)
    assert found.num_searched <= 7 and found.spent.calls <= calls


def test_another_model_of_the_same_cloud(tmp_path: Path) -> None:
    cloud = memory_cloud()
    grown(CloudGate(cloud), tmp_path / "a", reflection=CloudReflection(model="large"))
    assert [each.model for each in cloud.requests].count("large") == 1
    cloud = memory_cloud()
    grown(CloudGate(cloud), tmp_path / "b")
    assert {each.model for each in cloud.requests} == {"small"}


def test_a_detector_that_fails_keeps_everything_from_it(tmp_path: Path) -> None:
    class FailsOnAnswers:
        def find(self, text: str) -> Iterator[Finding]:
            if "no idea" in text:
                raise ValueError("cannot read this")
            yield from ()

    settings = DetectorSettings(dictionary=tuple(parse_dictionary(DICTIONARY)))
    named = build_detector("dictionary", settings)
    redactor = Redactor(finder=HereFinder({"dictionary": named, "fails": FailsOnAnswers()}))
    cloud, other = memory_cloud(), MemoryCloud(lambda text: "Good.")
    with pytest.raises(RedactionError):
        grown(CloudGate(cloud), tmp_path, redactor, reflection=CloudReflection(model="large", cloud=other))
    assert cloud.requests != [] and other.requests == []
    assert "Write a better" not in (tmp_path / "sent.jsonl").read_text()


class Writer:
    """An edge that writes one prompt."""

    def __init__(self) -> None:
        self.read, self.account = list[str](), Account()

    def count_in(self, account: Account) -> None:
        self.account = account

    def start(self) -> Vector:
        return np.zeros(1)

    def write_after(self, x: Vector, prompts_as_text: Sequence[str]) -> list[str]:
        assert x.tolist() == [0.0]
        self.read += prompts_as_text
        self.account.edge(forward_tokens=5, num_parameters=100)
        return ["Good."]


def test_the_edge_writes_and_sends_nothing_for_it(tmp_path: Path) -> None:
    cloud, edge = memory_cloud(), Writer()
    found = grown(CloudGate(cloud), tmp_path, reflection=EdgeReflection(edge))
    assert found.prompt == "Good." and found.growths[0].joined == ("Good.",)
    # The first prompt and the new one on six examples and one more: nothing else was asked.
    assert found.spent.calls == len(cloud.requests) == 14 and found.taken.cloud_by_kind.keys() == {"chat"}
    assert "Write a better" not in (tmp_path / "sent.jsonl").read_text()
    assert found.taken.edge_flops == 2 * 100 * 5 * len(edge.read) > 0
    # What it reads is redacted too, since what it writes is sent; the task is last.
    assert "Ann Lee" not in edge.read[0] and "<TEXT_" in edge.read[0] and edge.read[0].index("Bad.") < 100
    assert edge.read[0].endswith("in at most 60 words.\nAssistant:")


def test_a_model_on_the_edge_reads_what_fits_and_counts_by_its_size() -> None:
    backbone = tiny_backbone("llama")
    fresh = LoraAdapter.fresh(backbone.model, LoraShape(rank=1, targets=("q_proj",)), seed=0)
    turns = [{"role": "system", "content": "Write a word."}, {"role": "user", "content": "Long. " * 200}]
    with redactor_here() as redactor, edge_adapter(backbone, fresh, EdgeConfig(max_new_tokens=3)) as edge:
        gate = CloudGate(MemoryCloud())
        reflect = EdgeReflection(edge).begin(Pipeline(redactor, gate, PipelineConfig(model="m")), max_tokens=128)
        one, again = (reflect(RedactedJson(turns, {})) for _ in range(2))
    taken = gate.account.taken()
    assert one == again and taken.cloud == Cost() and gate.sent.payloads == []
    # Twice a whole context of 128 tokens less what may be written, and what was written: 1 to 3 tokens.
    assert 2 * 126 <= taken.edge_forward_tokens <= 2 * 128
    assert taken.edge_flops == 2 * gate.account.num_edge_parameters * taken.edge_forward_tokens > 0


def test_the_dry_run_knows_who_writes() -> None:
    with redactor_here() as redactor:
        line = Pipeline(redactor, CloudGate(MemoryCloud()), PipelineConfig(model="m"))
        there, here = (
            project(line, TRAIN, JUDGED, PromptPool(["Bad."]), config=CONFIG, is_reflecting_here=is_here)
            for is_here in (False, True)
        )
    # A prompt each time, and its answers to seven requests.
    times = CONFIG.solve.num_growths
    assert (there.num_growth_calls, here.num_growth_calls) == (8 * times, 7 * times)


def test_reflections_that_cannot_be_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="without a model"):
        CloudReflection(cloud=MemoryCloud())
    with pytest.raises(InputError, match="the pool does not grow"):
        grown(CloudGate(MemoryCloud()), tmp_path, reflection=CloudReflection(model="large"), config=FitConfig())
    # Nothing is sent before it is known that the other model has a price.
    cloud = MemoryCloud()
    with pytest.raises(InputError, match="no price"):
        grown(
            CloudGate(cloud, price=PRICE),
            tmp_path / "b",
            reflection=CloudReflection(model="large"),
            budget=Budget(usd=1),
        )
    assert cloud.requests == []


def test_a_door_beside_another_one_shares_its_purse() -> None:
    cloud, other, purse = MemoryCloud(), MemoryCloud(), Purse(Budget(calls=2))
    gate = CloudGate(cloud, purse=purse)
    beside = gate.beside(other, price=OTHER_PRICE, kind="reflection")
    assert beside.purse is purse and beside.sent is gate.sent and beside.account is gate.account
    assert beside.beside(None, price=None, kind="x").known_price is None

"""The sandwich: what leaves, what comes back, and that nothing leaves where something is wrong."""

from __future__ import annotations

import json
import random
import re
import threading
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from redactors import redactor_here
from scripted_clouds import MemoryCloud

from cotune.errors import BudgetError, InputError, RedactionError
from cotune.sandwich.budget import Budget, Purse
from cotune.sandwich.chat import ChatAnswer, ChatRequest, ToolCall
from cotune.sandwich.cloud_gate import CloudGate
from cotune.sandwich.detect import HereFinder
from cotune.sandwich.pipeline import MergeJob, Pipeline, PipelineConfig
from cotune.sandwich.redact import Redactor
from cotune.sandwich.tools import Tool, ToolBox

TEXT = "Tell Ann Lee (ann@example.org) that Blue Heron starts."
PRIVATE = ("Ann Lee", "ann@example.org", "Blue Heron")


class Streams(MemoryCloud):
    """Tells its answer letter by letter."""

    def stream(self, request: ChatRequest, *, timeout_s: float, on_text: Callable[[str], None]) -> ChatAnswer:
        answer = self.send(request, timeout_s=timeout_s)
        for letter in answer.text:
            on_text(letter)
        return answer


class Splits:
    """A rewriter that asks about each placeholder, and tries to get a name out."""

    def __init__(self, extra: str = "") -> None:
        self.extra, self.seen = extra, list[str]()

    def rewrite(self, redacted: str) -> Sequence[str]:
        self.seen.append(redacted)
        return [f"What of {found}?{self.extra}" for found in re.findall(r"<[A-Z]+_\d+>", redacted)] + ["  "]


class Merges:
    """A merger that shows all that it sees."""

    def __init__(self) -> None:
        self.jobs: list[MergeJob] = []

    def merge(self, job: MergeJob) -> str:
        self.jobs.append(job)
        return f"{len(job.request)}|{'+'.join(job.answers)}|{job.draft}"


def pipeline(cloud: MemoryCloud, redactor: Redactor, *, gate: CloudGate | None = None, **parts: Any) -> Pipeline:
    settings = {name: parts.pop(name) for name in ("mode", "tool_results", "max_questions") if name in parts}
    return Pipeline(redactor, gate or CloudGate(cloud), PipelineConfig(model="m", **settings), **parts)


def sent_by(cloud: MemoryCloud) -> str:
    return "\n".join(request.payload.decode() for request in cloud.requests)


def test_nothing_private_leaves_and_all_of_it_comes_back() -> None:
    cloud = MemoryCloud()
    with redactor_here() as redactor:
        done = pipeline(cloud, redactor, prompt="Keep <KIND_NUMBER> as it is.").run(TEXT)
    assert done.text == f"echo {TEXT}" and done.cost.calls == 1
    assert not any(value in sent_by(cloud) for value in PRIVATE)
    assert [message["role"] for message in cloud.requests[0].messages.value] == ["system", "user"]
    assert cloud.requests[0].messages.value[0]["content"] == "Keep <KIND_NUMBER> as it is."


def test_sub_questions_go_out_one_by_one_and_merge_before_they_are_restored() -> None:
    cloud, rewriter, merger = MemoryCloud(lambda text: text.upper()), Splits(" Ask Jürgen Groß."), Merges()
    with redactor_here() as redactor:
        done = pipeline(cloud, redactor, rewriter=rewriter, merger=merger).run(TEXT)
    assert len(cloud.requests) == 3
    assert not any(value in sent_by(cloud) + rewriter.seen[0] for value in (*PRIVATE, "Jürgen"))
    job = merger.jobs[0]
    assert job.request == TEXT and all("PERSON_" in answer for answer in job.answers)
    # Placeholders come back as they were written at first, whatever the cloud did to them.
    assert done.text.startswith(f"{len(TEXT)}|WHAT OF Ann Lee? ASK Jürgen Groß.+WHAT OF ann@example.org?")


def test_a_rewriter_that_writes_too_much_or_nothing() -> None:
    cloud = MemoryCloud()
    with redactor_here() as redactor:
        pipeline(cloud, redactor, rewriter=Splits(), max_questions=2).run(TEXT)
        assert len(cloud.requests) == 2
        done = pipeline(cloud, redactor, rewriter=Splits()).run("Nothing private here.")
    assert done.text == "echo Nothing private here."


def test_in_parallel_the_edge_drafts_from_the_raw_request_meanwhile() -> None:
    drafting, release = threading.Event(), threading.Event()

    def slow(text: str) -> str:
        assert drafting.wait(20)
        release.set()
        return "cloud"

    class Drafts:
        def draft(self, request: str) -> str:
            drafting.set()
            assert release.wait(20)  # the cloud is at work at the same time
            return f"draft of {request}"

    with redactor_here() as redactor:
        done = pipeline(MemoryCloud(slow), redactor, mode="parallel", drafter=Drafts(), merger=Merges()).run(TEXT)
    assert done.text == f"{len(TEXT)}|cloud|draft of {TEXT}"


def test_a_failing_detector_sends_nothing() -> None:
    class Broken:
        def find(self, text: str) -> list[Any]:
            raise OSError(text)

    cloud = MemoryCloud()
    with Redactor(finder=HereFinder({"broken": Broken()})) as redactor, pytest.raises(RedactionError):
        pipeline(cloud, redactor).run(TEXT)
    assert cloud.requests == []


def test_a_prompt_that_holds_something_private_sends_nothing() -> None:
    cloud = MemoryCloud()
    with redactor_here() as redactor, pytest.raises(RedactionError, match="the prompt holds a value of kind EMAIL"):
        pipeline(cloud, redactor, prompt="Example: write to ann@example.org").run("hello")
    assert cloud.requests == []


def test_the_same_generator_gives_the_same_requests_and_another_one_others() -> None:
    cloud = MemoryCloud()
    for seed in (1, 1, 2):
        with redactor_here() as redactor:
            pipeline(cloud, redactor, rewriter=Splits()).run(TEXT, random.Random(seed))
    digests = [request.digest for request in cloud.requests]
    assert sorted(digests[:3]) == sorted(digests[3:6]) and not set(digests[:3]) & set(digests[6:])


def test_a_budget_that_is_too_small_for_all_questions_says_so() -> None:
    cloud = MemoryCloud()
    with redactor_here() as redactor, pytest.raises(BudgetError):
        gate = CloudGate(cloud, purse=Purse(Budget(calls=2)))
        pipeline(cloud, redactor, gate=gate, rewriter=Splits()).run(TEXT)
    assert len(cloud.requests) == 2


def calling(text: str) -> ChatAnswer:
    """Calls a tool with what stands in the request; after its result, says what it was told."""
    found = re.search(r"<PERSON_\d+>", text)
    if found is None or "balance" in text:
        return ChatAnswer(text=f"told {text}")
    arguments = json.dumps({"name": found[0]})
    return ChatAnswer(text="", tool_calls=(ToolCall(id="call_1", name="balance", arguments=arguments),))


def bank(asked: list[str]) -> ToolBox:
    def balance(name: str) -> dict[str, Any]:
        asked.append(name)
        return {"balance of": name, "mail": "late@example.org"}

    parameters = {"type": "object", "properties": {"name": {"type": "string"}}, "required": ["name"]}
    return ToolBox([Tool(name="balance", description="Of a person.", parameters=parameters, function=balance)])


def test_tool_results_stay_here_by_default() -> None:
    cloud, asked = MemoryCloud(calling), list[str]()
    with redactor_here() as redactor:
        done = pipeline(cloud, redactor, tools=bank(asked)).run("What has Ann Lee?")
    assert asked == ["Ann Lee"] and len(cloud.requests) == 1
    assert "late@example.org" in done.text and "late@" not in sent_by(cloud)
    assert cloud.requests[0].tools[0]["function"]["name"] == "balance"


def test_tool_results_may_go_on_redacted() -> None:
    cloud, asked = MemoryCloud(calling), list[str]()
    with redactor_here() as redactor:
        done = pipeline(cloud, redactor, tools=bank(asked), tool_results="redacted").run("What has Ann Lee?")
    assert asked == ["Ann Lee"] and len(cloud.requests) == 2 and done.cost.calls == 2
    assert [message["role"] for message in cloud.requests[1].messages.value] == ["user", "assistant", "tool"]
    assert not any(value in sent_by(cloud) for value in ("Ann Lee", "late@example.org"))
    assert '"mail": "late@example.org"' in done.text and '"balance of": "Ann Lee"' in done.text


def test_a_cloud_that_never_stops_calling_is_stopped() -> None:
    cloud = MemoryCloud(lambda text: ChatAnswer(text="", tool_calls=(ToolCall(id="c", name="x", arguments="{}"),)))
    with redactor_here() as redactor:
        done = pipeline(cloud, redactor, tools=bank([]), tool_results="redacted").run("Go on.")
    assert len(cloud.requests) == 5 and len(done.tool_runs) == 4


@pytest.mark.parametrize("settings", [{"mode": "both"}, {"max_tokens": 0}, {"tool_results": "raw"}])
def test_settings_that_cannot_be_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=next(iter(settings))):
        PipelineConfig(model="m", **settings)


def test_parallel_needs_a_drafter() -> None:
    with redactor_here() as redactor, pytest.raises(InputError, match="drafter"):
        pipeline(MemoryCloud(), redactor, mode="parallel")


def test_a_streamed_answer_is_restored_while_it_comes() -> None:
    told: list[str] = []
    with redactor_here() as redactor:
        done = pipeline(Streams(), redactor).run_streamed(TEXT, told.append)
    assert done.text == "".join(told) == f"echo {TEXT}" and len(told) > 10 and all(told)
    assert not any("<" in piece or "_" in piece for piece in told)


@pytest.mark.parametrize("parts", [{"merger": Merges()}, {"rewriter": Splits()}])
def test_what_the_edge_still_writes_is_not_streamed(parts: dict[str, Any]) -> None:
    cloud = Streams()
    with redactor_here() as redactor, pytest.raises(InputError, match="cannot be streamed"):
        pipeline(cloud, redactor, **parts).run_streamed(TEXT, print)
    assert cloud.requests == []

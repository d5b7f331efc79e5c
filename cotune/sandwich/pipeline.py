"""A request through the sandwich: what is private stays here, a closed cloud answers the rest.

    serial      q -> redact -> r -> rewrite -> u_1.. -> cloud under P -> c_1.. -> merge(q, c) -> restore -> z
    parallel    the same, and the edge drafts from q while the cloud answers: merge(q, c, draft)

q, the map of placeholders, the draft, tool results and z never leave. r and each u went through the redactor; P is the
user's own prompt, sent as it is. A rewriter reads r; what it writes is restored and redacted again, so that a model
that invents or recovers something private does not get it out.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from cotune.errors import InputError, RedactionError
from cotune.sandwich.account import WHOLE
from cotune.sandwich.chat import ChatAnswer, ChatRequest
from cotune.sandwich.cloud_gate import Asked, CloudGate
from cotune.sandwich.cost import Cost
from cotune.sandwich.placeholders import LITERAL
from cotune.sandwich.redact import RedactedJson, RedactedRequest, Redactor
from cotune.sandwich.tools import ToolBox, ToolRun

ToolResults = Literal["withheld", "redacted"]


@dataclass(frozen=True, kw_only=True)
class PipelineConfig:
    """How requests travel."""

    model: str
    """The cloud's name for its model."""
    max_tokens: int = 256
    """Of each of the cloud's answers."""
    temperature: float = 0.0
    """Of the cloud's sampling."""
    seed: int | None = None
    """Of the cloud's sampling, where it takes one."""
    mode: Literal["serial", "parallel"] = "serial"
    """In parallel the edge drafts meanwhile."""
    max_questions: int = 8
    """Sub-questions of one request; a rewriter that writes more loses the last ones."""
    tool_results: ToolResults = "withheld"
    """What the cloud is told of a tool's result: that it is there, or its redacted text, after which it goes on."""
    max_tool_rounds: int = 4
    """Times that the cloud may go on after tools, where it sees their results."""
    num_parallel: int = 4
    """Requests to the cloud at once."""

    def __post_init__(self) -> None:
        for name in ("max_tokens", "max_questions", "max_tool_rounds", "num_parallel"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name)}, expected at least 1")
        if self.mode not in ("serial", "parallel"):
            raise InputError(f"mode is {self.mode!r}, expected serial or parallel")
        if self.tool_results not in ("withheld", "redacted"):
            raise InputError(f"tool_results is {self.tool_results!r}, expected withheld or redacted")


@dataclass(frozen=True)
class MergeJob:
    """All that the last stage may read; it never leaves.

    Attributes:
        request: q.
        answers: of the cloud, in the order of the questions, with placeholders.
        draft: the edge's own, where the mode is parallel.
        tool_runs: what tools said.
    """

    request: str
    answers: tuple[str, ...]
    draft: str | None = None
    tool_runs: tuple[ToolRun, ...] = ()


class Rewriter(Protocol):
    """The edge before the cloud."""

    def rewrite(self, redacted: str) -> Sequence[str]:
        """What to ask instead: one text, or sub-questions."""
        ...


class Drafter(Protocol):
    """The edge beside the cloud."""

    def draft(self, request: str) -> str:
        """Its own answer to q."""
        ...


class Merger(Protocol):
    """The edge after the cloud."""

    def merge(self, job: MergeJob) -> str:
        """The answer, in which placeholders may stand."""
        ...


class JoinAnswers:
    """The merge without a model: answers and what tools said, one below the other; a draft is not read."""

    def merge(self, job: MergeJob) -> str:
        told = [f"{run.call.name}: {run.result}" for run in job.tool_runs]
        return "\n\n".join([*(answer for answer in job.answers if answer), *told])


@dataclass(frozen=True)
class Prepared:
    """A request that was redacted and rewritten, and not sent.

    Attributes:
        text: q.
        request: its map.
        questions: u; what would be sent beside the prompt, each a conversation of one message.
    """

    text: str = field(repr=False)
    request: RedactedRequest = field(repr=False)
    questions: tuple[RedactedJson, ...]


@dataclass(frozen=True)
class PipelineResult:
    """An answer.

    Attributes:
        text: z, restored.
        answers: the cloud's, as they came.
        tool_runs: what tools did.
        cost: what it cost now.
    """

    text: str
    answers: tuple[ChatAnswer, ...]
    tool_runs: tuple[ToolRun, ...]
    cost: Cost


class Pipeline:
    """Redactor, edge and cloud in a row.

    Args:
        redactor: serves this pipeline while it lives.
        gate: the door to the cloud.
        config: how requests travel.
        prompt: P, the system message; empty for none.
        rewriter, drafter, merger: the edge; left out, the cloud is asked r and its answers are joined.
        tools: that the cloud may call.

    Raises:
        InputError: mode parallel without a drafter.

    Example:
        >>> with Redactor() as redactor:  # doctest: +SKIP
        ...     pipeline = Pipeline(redactor, CloudGate(cloud), PipelineConfig(model="starter"))
        ...     print(pipeline.run("Write to ann@example.org that I am late.").text)
    """

    def __init__(
        self,
        redactor: Redactor,
        gate: CloudGate,
        config: PipelineConfig,
        *,
        prompt: str = "",
        rewriter: Rewriter | None = None,
        drafter: Drafter | None = None,
        merger: Merger | None = None,
        tools: ToolBox | None = None,
    ) -> None:
        if config.mode == "parallel" and drafter is None:
            raise InputError("mode is parallel and there is no drafter, expected one; or take mode serial")
        self.redactor, self.gate, self.config, self.prompt = redactor, gate, config, prompt
        self._checked_prompts: set[str] = set()
        self.rewriter, self.drafter, self.merger, self.tools = rewriter, drafter, merger or JoinAnswers(), tools

    def through(self, gate: CloudGate) -> Pipeline:
        """The same through another door, such as one with a budget."""
        return self._with(gate, self.rewriter)

    def rewriting(self, rewriter: Rewriter | None) -> Pipeline:
        """The same with another edge before the cloud."""
        return self._with(self.gate, rewriter)

    def _with(self, gate: CloudGate, rewriter: Rewriter | None) -> Pipeline:
        return Pipeline(
            self.redactor,
            gate,
            self.config,
            prompt=self.prompt,
            rewriter=rewriter,
            drafter=self.drafter,
            merger=self.merger,
            tools=self.tools,
        )

    def prepare(
        self, text: str, generator: random.Random | None = None, *, redactor: Redactor | None = None
    ) -> Prepared:
        """Redact and rewrite; nothing is sent.

        Args:
            text: q.
            generator: of the placeholders; one with the same state gives the same requests.
            redactor: another than the pipeline's own, which knows what numbers were given out.

        Raises:
            RedactionError, InputError: as `RedactedRequest.redact`; there is nothing to send.
        """
        request = (redactor or self.redactor).request(generator)
        with self.gate.account.stage("redact"):
            redacted = request.redact(text).text
            written = [text]
        if self.rewriter is not None:
            with self.gate.account.stage("rewrite"):
                rewritten = self.rewriter.rewrite(redacted)
            written = [request.restore(each) for each in rewritten if each.strip()][: self.config.max_questions] or [
                text
            ]
        return Prepared(text, request, tuple(request.redact_messages([_user(each)]) for each in written))

    def request_of(self, prepared: Prepared, question: RedactedJson, prompt: str | None = None) -> ChatRequest:
        """What is sent for a question under a prompt; P where none is given.

        Raises:
            RedactionError: the prompt holds something private.
        """
        prompt = self.prompt if prompt is None else prompt
        self.check_prompt(prompt)
        system = [{"role": "system", "content": prompt}] if prompt else []
        return ChatRequest(
            model=self.config.model,
            messages=RedactedJson([*system, *question.value], question.counts),
            max_tokens=self.config.max_tokens,
            temperature=self.config.temperature,
            seed=self.config.seed,
            tools=self.tools.schemas if self.tools else (),
        )

    def check_prompt(self, prompt: str) -> None:
        """Refuse a prompt in which a detector finds something; an example of a request may have got into it.

        Raises:
            RedactionError: it does, or a detector failed; nothing was sent.
        """
        if prompt in self._checked_prompts or not prompt:
            return
        found = {each.kind for each in self.redactor.request().redact(prompt).replacements} - {LITERAL}
        if found:
            raise RedactionError(
                f"the prompt holds a value of kind {min(found)}, and prompts are sent as they are; take it out"
            )
        self._checked_prompts.add(prompt)

    def ask(self, prepared: Prepared, prompt: str | None = None) -> tuple[tuple[ChatAnswer, ...], Cost]:
        """The cloud's answers to all questions, side by side, and what they cost; tools are not run.

        Raises:
            BudgetError, WireError: see `CloudGate.ask`; answers of the other questions are in the cache.
        """
        with self.gate.account.stage("cloud"):
            asked = self.ask_all([self.request_of(prepared, question, prompt) for question in prepared.questions])
        return tuple(each.answer for each in asked), sum((each.cost for each in asked), Cost())

    def ask_all(self, requests: Sequence[ChatRequest]) -> list[Asked]:
        """Answers side by side, in order. After an error nothing more is begun; what was paid for is in the cache.

        Raises:
            BudgetError, WireError: see `CloudGate.ask`.
        """
        threads = ThreadPoolExecutor(self.config.num_parallel)
        try:
            coming = [threads.submit(self.gate.ask, request) for request in requests]
            return [each.result() for each in coming]
        finally:
            threads.shutdown(cancel_futures=True)

    def merge(self, prepared: Prepared, job: MergeJob) -> str:
        """z, restored."""
        with self.gate.account.stage("merge"):
            return prepared.request.restore(self.merger.merge(job))

    def run(self, text: str, generator: random.Random | None = None) -> PipelineResult:
        """One request, all the way.

        Raises:
            RedactionError: nothing was sent.
            BudgetError: there was no room for it, or for all of it.
            WireError: the cloud failed.
        """
        with self.gate.account.stage(WHOLE):
            prepared = self.prepare(text, generator)
            draft = None
            if self.config.mode == "parallel":
                assert self.drafter is not None
                with ThreadPoolExecutor(1) as thread:
                    coming = thread.submit(self._ask_with_tools, prepared)
                    with self.gate.account.stage("draft"):
                        draft = self.drafter.draft(text)
                    answers, runs, cost = coming.result()
            else:
                answers, runs, cost = self._ask_with_tools(prepared)
            job = MergeJob(text, tuple(answer.text for answer in answers), draft, runs)
            return PipelineResult(self.merge(prepared, job), answers, runs, cost)

    def run_streamed(
        self, text: str, on_text: Callable[[str], None], generator: random.Random | None = None
    ) -> PipelineResult:
        """One request whose answer is told as it comes, restored; a placeholder that is cut waits for its rest.

        Only the cloud's own answer can come so: a merger or a rewriter writes after it is whole.

        Args:
            text: q.
            on_text: told the pieces of z; all of them make its text.
            generator: of the placeholders.

        Raises:
            InputError: the pipeline has a rewriter, a merger of its own, tools, or the mode parallel.
            As `run`; also after pieces were told.
        """
        if self.rewriter or self.tools or self.config.mode != "serial" or not isinstance(self.merger, JoinAnswers):
            raise InputError(
                "the edge works on the cloud's answer (rewriter, merger, tools or mode parallel), so it cannot be "
                "streamed, expected none of them; run it without streaming"
            )
        with self.gate.account.stage(WHOLE):
            prepared = self.prepare(text, generator)
            stream, told = prepared.request.restore_stream(), list[str]()

            def tell(piece: str) -> None:
                if piece:
                    told.append(piece)
                    on_text(piece)

            request = self.request_of(prepared, prepared.questions[0])
            with self.gate.account.stage("cloud"):
                asked = self.gate.ask_streamed(request, lambda piece: tell(stream.feed(piece)))
            tell(stream.finish())
            return PipelineResult("".join(told), (asked.answer,), (), asked.cost)

    def _ask_with_tools(self, prepared: Prepared) -> tuple[tuple[ChatAnswer, ...], tuple[ToolRun, ...], Cost]:
        answers, cost = self.ask(prepared)
        if self.tools is None:
            return answers, (), cost
        runs: list[ToolRun] = []
        final: list[ChatAnswer] = []
        for question, answer in zip(prepared.questions, answers, strict=True):
            last, paid = self._finish_tools(prepared, question, answer, runs)
            final.append(last)
            cost += paid
        return tuple(final), tuple(runs), cost

    def _finish_tools(
        self, prepared: Prepared, question: RedactedJson, answer: ChatAnswer, runs: list[ToolRun]
    ) -> tuple[ChatAnswer, Cost]:
        """Run what the cloud calls; where it may see results, go on with it until it calls no more."""
        assert self.tools is not None
        cost, turns = Cost(), prepared.request.restore_json(question.value)
        for _ in range(self.config.max_tool_rounds):
            if not answer.tool_calls:
                break
            with self.gate.account.stage("tools"):
                done = [self.tools.run(call, prepared.request) for call in answer.tool_calls]
            runs += done
            if self.config.tool_results == "withheld":
                break
            # All turns in the clear, and through the redactor together: results may hold what nobody saw before.
            turns += [prepared.request.restore_json(_assistant(answer)), *map(_tool_message, done)]
            asked = self.gate.ask(self.request_of(prepared, prepared.request.redact_messages(turns)))
            answer, cost = asked.answer, cost + asked.cost
        return answer, cost


def _user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def _assistant(answer: ChatAnswer) -> dict[str, Any]:
    calls = [
        {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
        for call in answer.tool_calls
    ]
    return {"role": "assistant", "content": answer.text, "tool_calls": calls}


def _tool_message(run: ToolRun) -> dict[str, Any]:
    told = run.result if isinstance(run.result, str) else json.dumps(run.result, ensure_ascii=False, default=str)
    return {"role": "tool", "tool_call_id": run.call.id, "content": told}

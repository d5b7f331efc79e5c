"""What all arms of the sandwich's studies share: one cloud, one edge, one budget, one way to count.

An arm learns behind a gate whose purse holds the training budget, and answers behind another one without a budget; both
have an account. So whatever an arm does, calls, tokens, operations of the edge, bytes and seconds are counted alike.
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from queue import Empty, Queue
from threading import Thread
from typing import Any, Protocol

from sandwich_tasks import Task

from cotune.errors import InputError
from cotune.models.adapters import LoraAdapter, LoraShape
from cotune.models.backbone import Backbone
from cotune.sandwich.account import WHOLE, Account, Taken, percentiles
from cotune.sandwich.budget import Budget, Purse
from cotune.sandwich.chat import CloudModel
from cotune.sandwich.cloud_gate import CloudGate, RetryRules
from cotune.sandwich.cost import Price
from cotune.sandwich.detect import HereFinder
from cotune.sandwich.detector_table import DetectorSettings, build_detector
from cotune.sandwich.edge_adapter import MERGE_TEMPLATE, EdgeAdapter, EdgeConfig, edge_adapter
from cotune.sandwich.fit import prepare_examples
from cotune.sandwich.leak import measure_leaks
from cotune.sandwich.pipeline import Pipeline, PipelineConfig
from cotune.sandwich.redact import Redactor
from cotune.sandwich.text_problem import FitExample

_READY_S = 300.0
_END_S = 30.0


@dataclass(frozen=True, kw_only=True)
class Course:
    """How long and how fast arms learn."""

    num_steps: int = 40
    """Of the adapter, in the arms that fit prompt and adapter together."""
    num_restore_steps: int = 40
    """Of the prompt, at the end."""
    num_refit_steps: int = 160
    """Of the adapter under the chosen prompt, after that."""
    num_batch_examples: int = 4
    """Of one step."""
    x_rate: float = 1e-2
    """Of the adapter (Adam)."""
    y_rate: float = 0.5
    """Of the prompt."""
    tolerance: float = 0.02
    penalty: float = 1.0
    rank: int = 4
    """Of the adapter."""
    num_samples: int = 3
    """Answers of self-consistency."""
    num_demonstrations: int = 2
    """Of in-context learning."""
    grow_every: int = 2
    """Looks at the constraint between two growths of a pool, in the arm whose pool grows."""
    num_rewrites: int = 3
    """Of a request, in each round of tuning a rewriter."""
    rewrite_rounds: int = 2
    """Of it."""


@dataclass(frozen=True, kw_only=True)
class Bench:
    """A task with all that an arm may use.

    Attributes:
        task: what is asked.
        cloud, model, price: who answers.
        edge: with a fresh adapter.
        budget: of training.
        course: how long arms learn.
        seed: of batches, samples and placeholders.
        folder: an empty one, for what an arm keeps while it learns.
        edge_flops: operations of the edge that arms without a cloud may learn with; None: `course.num_steps` steps.
    """

    task: Task
    cloud: CloudModel
    model: str
    price: Price | None
    edge: EdgeAdapter
    budget: Budget
    course: Course
    seed: int
    folder: Path
    edge_flops: int | None = None

    def gate(self, budget: Budget | None = None) -> CloudGate:
        """A door with an account of its own, which counts the edge too."""
        account = Account()
        self.edge.count_in(account)
        purse = Purse(budget or Budget())
        return CloudGate(self.cloud, price=self.price, purse=purse, account=account, retry=RetryRules(max_attempts=2))

    def redactor(self, *, is_raw: bool = False) -> Redactor:
        """With the task's detectors, in this process; raw: one that finds nothing."""
        return redactor_of(self.task, is_raw=is_raw)

    def pipeline(self, gate: CloudGate, *, is_raw: bool = False, **parts: Any) -> Pipeline:
        """Through a door.

        Args:
            gate: the door.
            is_raw: nothing is redacted.
            parts: of `Pipeline`, and of `PipelineConfig`: mode, temperature, seed.
        """
        settings = {name: parts.pop(name) for name in ("mode", "temperature", "seed") if name in parts}
        config = PipelineConfig(model=self.model, max_tokens=self.task.max_tokens, **settings)
        return Pipeline(self.redactor(is_raw=is_raw), gate, config, **parts)

    def prepared(self, pipeline: Pipeline, *parts: str) -> list[FitExample]:
        """The examples of some parts of the task, redacted."""
        examples = [each for part in parts for each in getattr(self.task, part)]
        return prepare_examples(pipeline, examples, f"seed {self.seed}".encode())

    def generator(self, number: int) -> random.Random:
        """Of the placeholders of a request."""
        return random.Random(f"{self.seed}-{number}")


def redactor_of(task: Task, *, is_raw: bool = False) -> Redactor:
    """With a task's detectors, in this process; raw: one that finds nothing."""
    names = () if is_raw else task.detectors
    settings = DetectorSettings(
        detectors=names or None,
        dictionary=task.own_words if "dictionary" in names else (),
        allow_list=task.allow_list if "unlisted" in names else (),
    )
    return Redactor(finder=HereFinder({name: build_detector(name, settings) for name in names}))


Answer = Callable[[str], str]


class Server(Protocol):
    """What an arm has learnt: answers requests behind any door."""

    def open(self, bench: Bench, gate: CloudGate) -> Answer:
        """From a request to z."""
        ...


@dataclass(frozen=True, kw_only=True)
class Learnt:
    """What came of an arm's training.

    Attributes:
        server: it answers.
        taken: what training took.
        sent: all that was sent.
        notes: numbers of the arm's own: prompt, gap, certificate.
    """

    server: Server
    taken: Taken
    sent: Sequence[str] = field(repr=False)
    notes: dict[str, Any] = field(default_factory=dict)


Arm = Callable[[Bench], Learnt]


def judge(bench: Bench, learnt: Learnt) -> dict[str, Any]:
    """Answer the test requests one by one; scores, cost for each request, seconds, leaks in all that was sent.

    Returns:
        As JSON holds it. `serve` is for one request; `latency_s` its median and 95th percentile on the clock.
    """
    gate = bench.gate()
    answer, scores = learnt.server.open(bench, gate), []
    for example in bench.task.test:
        with gate.account.stage("judged"):
            text = answer(example.request)
        scores.append(bench.task.metric(text, [example.target]))
    taken, count = gate.account.taken(), len(bench.task.test)
    parts = (*bench.task.train, *bench.task.validation, *bench.task.test)
    public = [text for each in parts for text in each.public]
    leaks = measure_leaks([each.private for each in parts], [*learnt.sent, *gate.sent.payloads], public)
    return {
        "scores": scores,
        "train": spending(learnt.taken),
        "serve": {name: value / count for name, value in spending(taken).items()},
        "latency_s": percentiles(taken.stage_seconds["judged"]),
        "stages_s": {name: percentiles(values)["p50"] for name, values in taken.stage_seconds.items() if name != WHOLE},
        "leaks": leaks.to_json(),
        "notes": learnt.notes,
    }


def spending(taken: Taken) -> dict[str, float]:
    """The ledger's columns, the same for every arm."""
    return {
        "calls": taken.cloud.calls,
        "tokens_in": taken.cloud.tokens_in,
        "tokens_out": taken.cloud.tokens_out,
        "usd": taken.cloud.usd,
        "bytes": taken.bytes_out + taken.bytes_in,
        "edge_flops": taken.edge_flops,
        "seconds": taken.seconds,
    }


@contextmanager
def opened_edge(
    backbone: Backbone,
    task: Task,
    course: Course,
    *,
    seed: int,
    max_context: int,
    template: str = MERGE_TEMPLATE,
    copies: bool = True,
) -> Iterator[EdgeAdapter]:
    """The edge model with a fresh LoRA adapter; afterwards it is as before.

    Raises:
        InputError: it leaves no room for an answer.
    """
    whole = backbone.spec
    room = min(max_context, whole.max_context)
    if task.max_new_tokens >= room:
        raise InputError(f"the edge reads at most {room} tokens, which leaves no room for {task.max_new_tokens}")
    fresh = LoraAdapter.fresh(backbone.model, LoraShape(rank=course.rank), seed=seed)
    config = EdgeConfig(template=template, max_new_tokens=task.max_new_tokens, copies=copies, seed=seed)
    backbone.spec = replace(whole, max_context=room)
    try:
        with edge_adapter(backbone, fresh, config) as edge:
            yield edge
    finally:
        backbone.spec = whole


@contextmanager
def own_cloud(model: str, *, dtype: str = "float32") -> Iterator[str]:
    """The base URL of `cotune cloud` in a process of its own, which ends with the block.

    Raises:
        InputError: it did not come up.
    """
    command = [sys.executable, "-m", "cotune", "cloud", model, "--dtype", dtype, "--port", "0", "--json"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        lines: Queue[str] = Queue()
        stdout = process.stdout
        Thread(target=lambda: lines.put(stdout.readline()), daemon=True).start()
        try:
            url = str(json.loads(lines.get(timeout=_READY_S))["url"])
        except (Empty, ValueError, KeyError) as error:
            raise InputError(f"cotune cloud {model} did not come up; try it alone") from error
        yield url.replace("ws", "http", 1) + "/v1"
    finally:
        process.terminate()
        try:
            process.wait(_END_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

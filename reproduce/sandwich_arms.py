"""The arms of the sandwich's studies, one function each: from a bench to what was learnt within its budget.

| arm | who answers | what is learnt |
|---|---|---|
| raw | cloud, nothing redacted | nothing |
| A zero_shot | cloud | nothing |
| random, icl | cloud | nothing: a prompt by chance; demonstrations, redacted |
| B search | cloud | the prompt of the pool, on as many examples as the tokens last for |
| C sft | edge | an adapter on the targets, with as many operations as H |
| D distilled | edge | an adapter on the cloud's answers, on as many requests as the tokens last for |
| E alternated | sandwich | prompt, then adapter, then prompt (BetterTogether, arXiv 2407.10930) |
| F joint, G penalty, H cuts | sandwich, or cloud where as good | both by `cotune.sandwich.fit`, then the adapter anew |
| H grown | sandwich | as H, and the cloud writes prompts from failures, which race with the others (GEPA's idea) |
| I consistent | cloud | nothing: the answer of several that is most like the others |
| J papilon | edge, cloud, edge | the prompt alone (PAPILLON, arXiv 2410.17127, the idea) |
| J tuned | edge, cloud, edge | as J, and the edge before the cloud first, on rewrites that were answered better |
| J preferred | edge, cloud, edge | as J tuned, and then from pairs of rewrites, by final loss and leaks (DPO) |
| K routed | edge, or cloud | adapter C, and how sure the edge must be to answer by itself |
| edge | edge | nothing |
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import count
from random import Random
from typing import Literal

import numpy as np
from sandwich_bench import Answer, Arm, Bench, Learnt

from cotune.errors import BudgetError, InputError
from cotune.evaluation import token_f1
from cotune.sandwich.bilevel.problem import Vector
from cotune.sandwich.bilevel.solve import Constraint, SolveConfig
from cotune.sandwich.bilevel.step_rules import AdamRule
from cotune.sandwich.cloud_gate import CloudGate
from cotune.sandwich.edge_adapter import REWRITE_TEMPLATE, EdgeDrafter, EdgeMerger, EdgeRewriter
from cotune.sandwich.examples import PrivateExample
from cotune.sandwich.fit import PROGRESS_FILE, SENT_FILE, FitConfig, fit, prepare_examples
from cotune.sandwich.pipeline import MergeJob, Pipeline
from cotune.sandwich.prompts.growth import GrowthConfig
from cotune.sandwich.prompts.pool import PromptPool
from cotune.sandwich.refit import LearnConfig, RefitConfig, learning_steps
from cotune.sandwich.rewrite_trials import DrawConfig
from cotune.sandwich.rewriter_preferences import PreferenceConfig
from cotune.sandwich.rewriter_tuning import RewriterConfig, TunedRewriter, tune_rewriter
from cotune.sandwich.sent_log import read_sent
from cotune.sandwich.text_problem import AnswerTable, Cell, FitExample, TextProblemConfig

Half = Literal["pre", "post", "both", "none"]
HALVES: tuple[Half, ...] = ("none", "pre", "post", "both")
_TEMPERATURE = 0.7


@dataclass(frozen=True, kw_only=True)
class CloudAlone:
    """The cloud under a prompt.

    Attributes:
        prompt: of it.
        is_raw: nothing is redacted.
        num_samples: answers; of several the one that is most like the others is taken.
    """

    prompt: str
    is_raw: bool = False
    num_samples: int = 1

    def open(self, bench: Bench, gate: CloudGate) -> Answer:
        if self.num_samples == 1:
            pipelines = [bench.pipeline(gate, prompt=self.prompt, is_raw=self.is_raw)]
        else:
            drawn = range(self.num_samples)
            pipelines = [
                bench.pipeline(gate, prompt=self.prompt, temperature=_TEMPERATURE, seed=seed) for seed in drawn
            ]
        numbers = count()

        def answer(request: str) -> str:
            number = next(numbers)
            # The same placeholders for all samples of a request.
            return medoid([each.run(request, bench.generator(number)).text for each in pipelines])

        return answer


@dataclass(frozen=True, kw_only=True)
class EdgeAlone:
    """The edge with an adapter; nothing is sent."""

    x: Vector

    def open(self, bench: Bench, gate: CloudGate) -> Answer:
        def answer(request: str) -> str:
            with gate.account.stage("edge"):
                return bench.edge.write(self.x, [MergeJob(request, ())])[0]

        return answer


@dataclass(frozen=True, kw_only=True)
class Sandwich:
    """Edge, cloud, edge.

    Attributes:
        prompt: of the cloud.
        x: of the edge behind it; beside it, the edge is untrained.
        half: where the edge works: before the cloud, behind it, both, or nowhere.
        mode: serial, or parallel with a draft.
        x_before: of the edge before it; None: untrained.
    """

    prompt: str
    x: Vector
    half: Half = "post"
    mode: Literal["serial", "parallel"] = "serial"
    x_before: Vector | None = None

    def open(self, bench: Bench, gate: CloudGate) -> Answer:
        line = sandwich_pipeline(
            bench, gate, self.x, half=self.half, mode=self.mode, prompt=self.prompt, x_before=self.x_before
        )
        numbers = count()
        return lambda request: line.run(request, bench.generator(next(numbers))).text


@dataclass(frozen=True, kw_only=True)
class Routed:
    """The edge where it is sure, else the cloud; the cloud alone without a threshold."""

    x: Vector
    prompt: str
    threshold: float | None

    def open(self, bench: Bench, gate: CloudGate) -> Answer:
        cloud, threshold = CloudAlone(prompt=self.prompt).open(bench, gate), self.threshold
        if threshold is None:
            return cloud
        alone = EdgeAlone(x=self.x).open(bench, gate)
        pipeline = bench.pipeline(gate)

        def answer(request: str) -> str:
            own = alone(request)
            return own if confidence(bench, pipeline, self.x, request, own) >= threshold else cloud(request)

        return answer


def sandwich_pipeline(
    bench: Bench,
    gate: CloudGate,
    x: Vector,
    *,
    half: Half,
    mode: Literal["serial", "parallel"],
    prompt: str = "",
    x_before: Vector | None = None,
) -> Pipeline:
    """The product's pipeline with the edge where `half` and `mode` say."""
    edge, start = bench.edge, bench.edge.start()
    before = start if x_before is None else x_before
    return bench.pipeline(
        gate,
        prompt=prompt,
        mode=mode,
        rewriter=EdgeRewriter(edge, before) if half in ("pre", "both") else None,
        drafter=EdgeDrafter(edge, start) if mode == "parallel" else None,
        merger=EdgeMerger(edge, x) if half in ("post", "both") else None,
    )


def untrained(bench: Bench, make: Callable[[Bench], object]) -> Learnt:
    """An arm that learns nothing."""
    gate = bench.gate()
    return Learnt(server=make(bench), taken=gate.account.taken(), sent=())  # type: ignore[arg-type]


def random_prompt(bench: Bench) -> Learnt:
    """A prompt of the pool by chance."""
    chosen = Random(bench.seed).choice(bench.task.prompts)
    return untrained(bench, lambda _: CloudAlone(prompt=chosen))


def in_context(bench: Bench) -> Learnt:
    """The plain prompt with demonstrations, redacted as requests are."""
    gate = bench.gate()
    shown = bench.prepared(bench.pipeline(gate), "train")[: bench.course.num_demonstrations]
    asked = [each.prepared.questions[0].value[0]["content"] for each in shown]
    turns = [f"{request}\nAnswer: {each.target}" for request, each in zip(asked, shown, strict=True)]
    prompt = "\n\n".join([bench.task.prompts[0], *turns])
    return Learnt(server=CloudAlone(prompt=prompt), taken=gate.account.taken(), sent=(), notes={"shots": len(shown)})


def search(bench: Bench) -> Learnt:
    """The best prompt of the pool for the cloud alone."""
    gate = bench.gate(bench.budget)
    pipeline = bench.pipeline(gate)
    examples = bench.prepared(pipeline, "train", "validation")
    prompt, _, seen = best_prompt(bench, pipeline, examples)
    return Learnt(
        server=CloudAlone(prompt=prompt),
        taken=gate.account.taken(),
        sent=gate.sent.payloads,
        notes={"prompt": prompt, "examples": seen},
    )


def sft(bench: Bench) -> Learnt:
    """An adapter on the targets; the edge answers from the raw request alone."""
    gate = bench.gate()
    x = _learn_targets(bench, gate)
    return Learnt(server=EdgeAlone(x=x), taken=gate.account.taken(), sent=())


def distilled(bench: Bench) -> Learnt:
    """An adapter on what the cloud says, which nobody else looks at: as many requests as the tokens last for."""
    gate = bench.gate(bench.budget)
    pipeline = bench.pipeline(gate, prompt=bench.task.prompts[0])
    labelled = [each.request for each in (*bench.task.train, *bench.task.validation)]
    requests = [PrivateExample(text, "unknown") for text in (*labelled, *bench.task.unlabelled)]
    cells = []
    for number, example in enumerate(requests):
        (one,) = prepare_examples(pipeline, [example], f"seed {bench.seed} {number}".encode())
        try:
            answers, _ = pipeline.ask(one.prepared)
        except BudgetError:
            break
        said = one.prepared.request.restore("\n\n".join(answer.text for answer in answers)).strip()
        if said:
            cells.append(Cell(replace(one, target=said), ()))
    if not cells:
        raise BudgetError("the budget buys no answer to learn from; raise --budget-tokens")
    x = train_edge(bench, gate, bench.edge.start(), cells, flops=bench.edge_flops)
    return Learnt(
        server=EdgeAlone(x=x), taken=gate.account.taken(), sent=gate.sent.payloads, notes={"answers": len(cells)}
    )


def alternated(bench: Bench) -> Learnt:
    """Prompt, adapter, prompt; each the best for the other as it stands."""
    gate = bench.gate(bench.budget)
    x = bench.edge.start()
    pipeline = sandwich_pipeline(bench, gate, x, half="post", mode="serial")
    examples = bench.prepared(pipeline, "train", "validation")
    prompt, table, seen = best_prompt(bench, pipeline, examples)
    cells = [_cell(table, prompt, each) for each in examples[:seen]]
    x = train_edge(bench, gate, x, cells, flops=bench.edge_flops)
    again = sandwich_pipeline(bench, gate, x, half="post", mode="serial")
    prompt, _, _ = best_prompt(bench, again, examples[:seen], table)
    return Learnt(
        server=Sandwich(prompt=prompt, x=x),
        taken=gate.account.taken(),
        sent=gate.sent.payloads,
        notes={"prompt": prompt, "examples": seen},
    )


def fitted(
    bench: Bench,
    constraint: Constraint,
    *,
    half: Half = "post",
    mode: Literal["serial", "parallel"] = "serial",
    prompts: Sequence[str] | None = None,
    is_growing: bool = False,
    is_tuned_before: bool = False,
    always_merges: bool = False,
) -> Learnt:
    """Prompt and adapter together, by the product; with a pool that grows, and a rewriter that is tuned first.

    Unless `always_merges`, the edge behind the cloud is left out where the cloud's answers as they are do as well on
    the validation examples.
    """
    course, task = bench.course, bench.task
    has_merger = half in ("post", "both")
    outside = bench.gate()
    pipeline = sandwich_pipeline(bench, outside, bench.edge.start(), half=half, mode=mode)
    solving = SolveConfig(
        constraint=constraint,
        tolerance=course.tolerance,
        penalty=course.penalty,
        num_steps=course.num_steps,
        num_restore_steps=course.num_restore_steps,
        x_rate=course.x_rate,
        y_rate=course.y_rate,
        x_rule="adam",
        grow_every=course.grow_every,
    )
    tuned: list[TunedRewriter] = []

    def make_rewriter(line: Pipeline, examples: Sequence[PrivateExample], key: bytes) -> EdgeRewriter:
        tuned.append(tune_before(bench, line, examples, key))
        return EdgeRewriter(bench.edge, tuned[0].x)

    losses = TextProblemConfig(num_batch_examples=course.num_batch_examples, seed=bench.seed)
    growth = GrowthConfig(seed=bench.seed) if is_growing else None
    refit = RefitConfig(num_steps=course.num_refit_steps)
    folder = bench.folder / f"{constraint}-{half}-{mode}"
    result = fit(
        pipeline,
        task.train,
        task.validation,
        task.metric,
        variable=PromptPool(prompts or task.prompts),
        budget=bench.budget,
        folder=folder,
        edge=bench.edge if has_merger else None,
        make_rewriter=make_rewriter if is_tuned_before else None,
        config=FitConfig(solve=solving, losses=losses, growth=growth, refit=refit, always_merges=always_merges),
    )
    # Without a merger the fit knows of no edge, and what rewrites is counted outside of it.
    taken = result.taken if has_merger else replace(result.taken, edge_flops=outside.account.taken().edge_flops)
    if has_merger and not result.is_merging:
        half, mode = "pre" if half == "both" else "none", "serial"
    last = result.history[-1]
    lines = [json.loads(line) for line in (folder / PROGRESS_FILE).read_text(encoding="utf-8").splitlines()]
    return Learnt(
        server=Sandwich(prompt=result.prompt, x=result.x, half=half, mode=mode, x_before=tuned[0].x if tuned else None),
        taken=taken,
        sent=read_sent(folder / SENT_FILE),
        notes={
            "prompt": result.prompt,
            "reason": result.reason,
            "gap": last.gap,
            "coupling": last.coupling,
            "is_sequential": result.is_sequential,
            "merged_score": result.merged_score,
            "plain_score": result.plain_score,
            "is_merging": result.is_merging,
            "num_refit_steps": result.num_refit_steps,
            "certificate": None if result.certificate is None else result.certificate.to_json(),
            "progress": [[line["tokens"], line["upper"], line["gap"]] for line in lines],
            "growths": [asdict(each) for each in result.growths],
            "rewriter": tuned[0].to_json() if tuned else None,
        },
    )


def consistent(bench: Bench) -> Learnt:
    """Several answers of the cloud, and the one that is most like the others."""
    return untrained(bench, lambda _: CloudAlone(prompt=bench.task.prompts[0], num_samples=bench.course.num_samples))


def tune_before(
    bench: Bench,
    pipeline: Pipeline,
    examples: Sequence[PrivateExample],
    key: bytes,
    *,
    is_preferring: bool = False,
) -> TunedRewriter:
    """The edge before the cloud, tuned under the pipeline's prompt, within its budget; preferring: from pairs too."""
    course = bench.course
    draw = DrawConfig(num_samples=course.num_rewrites, num_batch_examples=course.num_batch_examples, seed=bench.seed)
    config = RewriterConfig(
        num_rounds=course.rewrite_rounds,
        draw=draw,
        x_rate=course.x_rate,
        preferences=PreferenceConfig() if is_preferring else None,
    )
    start, metric = bench.edge.start(), bench.task.metric
    return tune_rewriter(bench.edge, pipeline, start, examples, metric, REWRITE_TEMPLATE, config, key=key)


def papilon(bench: Bench, *, is_tuned_before: bool = False, is_preferring: bool = False) -> Learnt:
    """The edge before and behind the cloud; the prompt is chosen through all of it.

    Args:
        is_tuned_before: the edge before the cloud learns first, within the same budget; else both are untrained.
        is_preferring: it learns from pairs too.
    """
    gate, x = bench.gate(bench.budget), bench.edge.start()
    pipeline = sandwich_pipeline(bench, gate, x, half="both", mode="serial", prompt=bench.task.prompts[0])
    tuned = None
    if is_tuned_before:
        key = f"seed {bench.seed}".encode()
        tuned = tune_before(bench, pipeline, bench.task.train, key, is_preferring=is_preferring)
        pipeline = pipeline.rewriting(EdgeRewriter(bench.edge, tuned.x))
    examples = bench.prepared(pipeline, "train", "validation")
    prompt, _, seen = best_prompt(bench, pipeline, examples)
    return Learnt(
        server=Sandwich(prompt=prompt, x=x, half="both", x_before=tuned.x if tuned else None),
        taken=gate.account.taken(),
        sent=gate.sent.payloads,
        notes={"prompt": prompt, "examples": seen, "rewriter": tuned.to_json() if tuned else None},
    )


def routed(bench: Bench) -> Learnt:
    """Adapter C; the threshold is the one with the best score on the validation examples."""
    gate = bench.gate(bench.budget)
    x, prompt = _learn_targets(bench, gate), bench.task.prompts[0]
    pipeline = bench.pipeline(gate, prompt=prompt)
    alone, cloud = EdgeAlone(x=x).open(bench, gate), CloudAlone(prompt=prompt).open(bench, gate)
    rows = []
    for example in bench.task.validation:
        own = alone(example.request)
        try:
            asked = cloud(example.request)
        except BudgetError:
            break
        scores = [bench.task.metric(text, [example.target]) for text in (own, asked)]
        rows.append((confidence(bench, pipeline, x, example.request, own), *scores))
    threshold = best_threshold(rows)
    return Learnt(
        server=Routed(x=x, prompt=prompt, threshold=threshold),
        taken=gate.account.taken(),
        sent=gate.sent.payloads,
        notes={"threshold": threshold, "examples": len(rows)},
    )


ARMS: Mapping[str, Arm] = {
    "raw": partial(untrained, make=lambda bench: CloudAlone(prompt=bench.task.prompts[0], is_raw=True)),
    "A zero_shot": partial(untrained, make=lambda bench: CloudAlone(prompt=bench.task.prompts[0])),
    "random": random_prompt,
    "icl": in_context,
    "B search": search,
    "C sft": sft,
    "D distilled": distilled,
    "E alternated": alternated,
    "F joint": partial(fitted, constraint="none"),
    "G penalty": partial(fitted, constraint="penalty"),
    "H cuts": partial(fitted, constraint="cut"),
    "H grown": partial(fitted, constraint="cut", is_growing=True),
    "I consistent": consistent,
    "J papilon": papilon,
    "J tuned": partial(papilon, is_tuned_before=True),
    "J preferred": partial(papilon, is_tuned_before=True, is_preferring=True),
    "K routed": routed,
    "edge": partial(untrained, make=lambda bench: EdgeAlone(x=bench.edge.start())),
}
"""In the order of the tables."""
SANDWICH = "H cuts"
"""Whose operations of the edge the arms without a cloud get."""
FITTED = ("F joint", "G penalty", "H cuts", "H grown")
"""Arms that leave the edge behind the cloud out where it does not help."""
WITH_FLOPS = ("C sft", "D distilled", "E alternated", "K routed")
"""Arms that learn with as many operations of the edge as `SANDWICH`."""
WITHOUT_ADVICE = (
    "raw",
    "A zero_shot",
    "random",
    "icl",
    "B search",
    "B gepa",
    "B mipro",
    "C sft",
    "D distilled",
    "I consistent",
    "K routed",
    "edge",
)
"""Arms in which no edge reads what a cloud says, so that a copy gate has no part in them."""
LEARNING = (
    "B search",
    "C sft",
    "D distilled",
    "E alternated",
    "F joint",
    "G penalty",
    "H cuts",
    "H grown",
    "J papilon",
    "J tuned",
    "J preferred",
    "K routed",
)
"""Arms to which the budget of training matters."""


def best_prompt(
    bench: Bench, pipeline: Pipeline, examples: Sequence[FitExample], table: AnswerTable | None = None
) -> tuple[str, AnswerTable, int]:
    """The prompt whose final texts score best, on as many examples as the budget lasts for.

    Returns:
        It, the answers, and on how many examples every prompt was asked.

    Raises:
        BudgetError: not even one example under every prompt.
    """
    prompts, table, rows = bench.task.prompts, table or AnswerTable(pipeline), list[list[float]]()
    for example in examples:
        try:
            table.fill(prompts, [example])
        except BudgetError:
            if not rows:
                raise
            break
        texts = _merged(pipeline, example, [_cell(table, prompt, example).job for prompt in prompts])
        rows.append([bench.task.metric(text, [example.source.target]) for text in texts])
    return prompts[int(np.argmax(np.mean(rows, axis=0)))], table, len(rows)


def train_edge(bench: Bench, gate: CloudGate, x: Vector, cells: Sequence[Cell], *, flops: int | None) -> Vector:
    """Adam on batches of cells, for `flops` operations of the edge, or for the course's steps.

    The loop is that of the product's refit.

    Raises:
        InputError: there is no cell.
    """
    if not cells:
        raise InputError("there is nothing to train the edge on, expected at least one example")
    course, account = bench.course, gate.account
    learn = LearnConfig(
        make_rule=AdamRule,
        rate=course.x_rate,
        num_batch_examples=course.num_batch_examples,
        seed=bench.seed,
    )
    begun, steps = account.taken().edge_flops, learning_steps(bench.edge, x, cells, learn)
    for step in count():
        spent = account.taken().edge_flops - begun
        if (flops is None and step >= course.num_steps) or (flops is not None and spent >= flops):
            return x
        with account.stage("training step"):
            x = next(steps)
    raise AssertionError("counting has no end")


def medoid(texts: Sequence[str]) -> str:
    """The text that shares most words with the others, the first of several.

    Example:
        >>> medoid(["a c", "a b", "a b"])
        'a b'
    """
    likeness = [sum(token_f1(text, [other]) for other in texts) for text in texts]
    return texts[int(np.argmax(likeness))]


def best_threshold(rows: Sequence[tuple[float, float, float]]) -> float | None:
    """The threshold with the best mean score; of equals the lowest, which asks the cloud least. None: always ask it.

    Args:
        rows: how sure the edge was, its score, the cloud's.

    Example:
        >>> best_threshold([(0.9, 1.0, 1.0), (0.2, 0.0, 1.0)])
        0.9
    """
    choices = [0.0, *sorted({sure for sure, _, _ in rows}), math.inf]

    def score(threshold: float) -> float:
        return sum(own if sure >= threshold else cloud for sure, own, cloud in rows)

    best = max(choices, key=lambda threshold: (score(threshold), -threshold))
    return best if math.isfinite(best) else None


def confidence(bench: Bench, pipeline: Pipeline, x: Vector, request: str, own: str) -> float:
    """How likely the edge's own tokens are, in [0, 1], one less their loss; 0 for an empty text."""
    if not own.strip():
        return 0.0
    example = FitExample(PrivateExample(request, own), pipeline.prepare(request), own)
    return 1 - float(bench.edge.losses(x, [Cell(example, ())])[0])


def _learn_targets(bench: Bench, gate: CloudGate) -> Vector:
    # Raw: what the edge writes alone is not restored.
    examples = bench.prepared(bench.pipeline(gate), "train", "validation")
    cells = [Cell(replace(each, target=each.source.target), ()) for each in examples]
    return train_edge(bench, gate, bench.edge.start(), cells, flops=bench.edge_flops)


def _merged(pipeline: Pipeline, example: FitExample, jobs: Sequence[MergeJob]) -> list[str]:
    """z of each job; an edge model writes all of them at once."""
    merger = pipeline.merger
    if isinstance(merger, EdgeMerger):
        written = merger.edge.write(merger.x, jobs)
        return [example.prepared.request.restore(text) for text in written]
    return [pipeline.merge(example.prepared, job) for job in jobs]


def _cell(table: AnswerTable, prompt: str, example: FitExample) -> Cell:
    return Cell(example, tuple(answer.text for answer in table.answers(prompt, example)))

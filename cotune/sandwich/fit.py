"""Tune the prompt and the edge's adapter together, within a budget; first say what it would cost.

    projection = project(pipeline, train, validation, pool, folder=folder)      nothing is sent
    result = fit(pipeline, train, validation, token_f1, variable=pool, budget=Budget(usd=1), folder=folder)

What happens, in order: every request is redacted once, before anything is sent, with placeholders drawn from a secret
of the run; a share of the training examples is set aside for the certificate; `bilevel.solve` moves x and y; under the
prompt that it chose the edge learns once more from all examples but those; what is to be shipped is judged and
certified; leaks are counted in all that was sent.

The folder has all of it: the secret, the journal of the budget, the answers, the log of what was sent. A run that ended
in any way, also by `kill -9`, goes on in it: it walks the same way again, and finds every answer that came. What was on
its way at that moment may have been paid for; it counts in full.
"""

from __future__ import annotations

import hashlib
import json
import random
import secrets
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from cotune.durable import replacing, write_new
from cotune.errors import BudgetError, DataError, InputError
from cotune.sandwich.account import Account, Taken
from cotune.sandwich.bilevel.certificate import Certificate, certify
from cotune.sandwich.bilevel.problem import Vector
from cotune.sandwich.bilevel.solve import Refresh, Solution, SolveConfig, one_sided_margin, solve
from cotune.sandwich.budget import Budget, Purse
from cotune.sandwich.cloud_gate import DEFAULT_CACHE_BYTES, AnswerCache, CloudGate
from cotune.sandwich.cost import Cost, shown_usd
from cotune.sandwich.examples import PrivateExample
from cotune.sandwich.leak import LeakMetrics, measure_leaks
from cotune.sandwich.pipeline import JoinAnswers, Pipeline, Rewriter
from cotune.sandwich.prompts.growth import Growth, GrowthConfig, PoolGrowth
from cotune.sandwich.prompts.pool import PromptPool
from cotune.sandwich.prompts.race import Race, RaceConfig, race
from cotune.sandwich.prompts.reflection import CloudReflection, Reflection
from cotune.sandwich.prompts.variable import PromptVariable
from cotune.sandwich.refit import LearnConfig, RefitConfig, WritingEdge, refit
from cotune.sandwich.rewriter_tuning import RewriterConfig
from cotune.sandwich.search_examples import SearchExamples, ask_rest, search_examples
from cotune.sandwich.sent_log import SentLog
from cotune.sandwich.text_problem import (
    AnswerTable,
    Cell,
    EdgeLosses,
    FitExample,
    Metric,
    MetricLosses,
    TextProblem,
    TextProblemConfig,
)

SECRET_FILE, RUN_FILE, RESULT_FILE = "redaction.secret", "fit.json", "result.json"
JOURNAL_FILE, SENT_FILE, ANSWERS, PROGRESS_FILE = "journal.jsonl", "sent.jsonl", "answers", "progress.jsonl"
_REWRITER_COST_FILE = "rewriter_cost.json"
_BYTES_PER_TOKEN = 4
_LIKELY_SHARE = 0.5


MakeRewriter = Callable[[Pipeline, Sequence[PrivateExample], bytes], Rewriter]
"""Makes the edge before the cloud, told the pipeline with its budget, the examples of the search, the run's secret."""


class TunedEdge(WritingEdge, Protocol):
    """An edge whose work is counted."""

    @property
    def name(self) -> str:
        """Its model and settings, in any words; a run goes on with the same alone."""
        ...

    def count_in(self, account: Account) -> None:
        """From now on, count tokens and parameters there."""
        ...


@dataclass(frozen=True, kw_only=True)
class FitConfig:
    """How to fit."""

    solve: SolveConfig = field(default_factory=SolveConfig)
    """Constraint, tolerance, rates, steps."""
    losses: TextProblemConfig = field(default_factory=TextProblemConfig)
    """What the losses weigh, and batches."""
    certificate_share: float = 0.25
    """Of the training examples, which the search does not see; 0 for no certificate."""
    delta: float = 0.05
    """How often a certificate may be false."""
    cache_bytes: int = DEFAULT_CACHE_BYTES
    """Of the answers on disk."""
    race: RaceConfig | None = None
    """Of a pool, before the search, on the training examples; None: every prompt sees every batch."""
    growth: GrowthConfig | None = None
    """Of a pool, during the search, by a model that reflects; None: its prompts are those given."""
    refit: RefitConfig | None = field(default_factory=RefitConfig)
    """Of the edge behind the cloud, after the search; None: what is shipped is the search's x."""
    always_merges: bool = False
    """Ship the edge behind the cloud also where the cloud's answers as they are were as good on validation."""

    def __post_init__(self) -> None:
        if not 0 <= self.certificate_share < 1:
            raise InputError(f"certificate_share is {self.certificate_share}, expected 0 or more and below 1")
        if not 0 < self.delta < 1:
            raise InputError(f"delta is {self.delta}, expected a share strictly between 0 and 1, such as 0.05")


@dataclass(frozen=True, kw_only=True)
class Projection:
    """What a fit would cost that looks at every example under every prompt.

    Attributes:
        num_cells: examples times prompts.
        num_paid: requests of them whose answers are there already.
        at_most: of the others; no cell costs more, whatever the tokenizer, failed attempts aside.
        likely: at 4 bytes for a token and half of the longest answer.
        lacking: what of the budget that is too much for, in words; empty where it fits.
        num_growth_calls: that the growth of a pool may take at most beyond that: for prompts, and for answers under
            them.
        num_rewriter_calls: that tuning a rewriter may take at most beyond that.
    """

    num_cells: int
    num_paid: int
    at_most: Cost
    likely: Cost
    lacking: str
    num_growth_calls: int = 0
    num_rewriter_calls: int = 0

    def to_json(self) -> dict[str, Any]:
        """All of it."""
        return asdict(self)

    def to_text(self) -> str:
        """A few lines for people."""
        lines = [f"{self.num_cells:,} requests under a prompt each; the answers to {self.num_paid:,} are there already"]
        for name, cost in (("likely", self.likely), ("at most", self.at_most)):
            lines.append(
                f"{name:<8} {cost.calls:,} calls, {cost.tokens_in:,} tokens in, {cost.tokens_out:,} out"
                + shown_usd(cost.usd)
            )
        if self.num_growth_calls:
            lines.append(f"growth   up to {self.num_growth_calls:,} calls more, as far as the budget lasts")
        if self.num_rewriter_calls:
            lines.append(
                f"rewriter up to {self.num_rewriter_calls:,} calls more, as far as its share of the budget lasts"
            )
        if self.lacking:
            lines.append(
                f"the budget may not hold all of it ({self.lacking}): then it ends early and keeps what it has"
            )
        return "\n".join(lines)


@dataclass(frozen=True, kw_only=True)
class FitResult:
    """What came of it.

    Attributes:
        prompt: to ship.
        x: numbers of the edge; empty where it has none.
        score: metric on the validation examples with what is to be shipped; None where the budget ended before.
        start_score: with the first prompt and the untrained edge.
        merged_score, plain_score: with that prompt and the edge, and with the cloud's answers as they are, on examples
            that the edge did not learn from: of training for the search's x, all of them by folds for a refit; None
            without an edge behind the cloud, or where no answers are there to compare with.
        is_merging: the edge behind the cloud is to be shipped.
        certificate: None where none was asked for or the budget ended before.
        leaks: of the private values that examples name, in all that was sent.
        reason: why the search ended: steps, patience or budget.
        num_searched: examples that the search looked at, under every prompt; fewer than there are where the budget does
            not pay for that (`search_examples`).
        num_refit_steps: that the edge behind the cloud learnt for after the search, under the prompt; 0: it is the
            search's.
        is_sequential: the edge had no part in how prompts compare.
        history: looks at the constraint.
        spent: over all runs in the folder.
        taken: by this run.
        race: how the pool was thinned before the search; None where it was not. The certificate compares who was left.
        growths: what joined and left the pool during the search, in order; empty where it was not to grow.
    """

    prompt: str
    x: Vector = field(repr=False)
    score: float | None
    start_score: float | None
    merged_score: float | None
    plain_score: float | None
    is_merging: bool
    certificate: Certificate | None
    leaks: LeakMetrics
    reason: str
    num_refit_steps: int
    num_searched: int
    is_sequential: bool
    history: tuple[Refresh, ...] = field(repr=False)
    spent: Cost
    taken: Taken = field(repr=False)
    race: Race | None = None
    growths: tuple[Growth, ...] = field(default=(), repr=False)

    def to_json(self) -> dict[str, Any]:
        """All but x."""
        return {
            "prompt": self.prompt,
            "score": self.score,
            "start_score": self.start_score,
            "merged_score": self.merged_score,
            "plain_score": self.plain_score,
            "is_merging": self.is_merging,
            "certificate": None if self.certificate is None else self.certificate.to_json(),
            "leaks": self.leaks.to_json(),
            "reason": self.reason,
            "num_refit_steps": self.num_refit_steps,
            "num_searched": self.num_searched,
            "is_sequential": self.is_sequential,
            "history": [asdict(each) for each in self.history],
            "spent": asdict(self.spent),
            "taken": self.taken.to_json(),
            "race": None if self.race is None else asdict(self.race),
            "growths": [asdict(each) for each in self.growths],
        }

    def to_text(self) -> str:
        """A page for people."""

        def shown(score: float | None) -> str:
            return "not measured, the budget ended" if score is None else f"{score:.3f}"

        looks = self.history[-1]
        leaks = self.leaks.to_json()
        return "\n".join(
            [
                f"prompt      {self.prompt!r}",
                f"score       {shown(self.score)} on validation (before: {shown(self.start_score)})",
                *self._merging_text(),
                f"searched    on {self.num_searched} examples, as many as the budget asks under every prompt",
                f"gap         {looks.gap:.4f} +- {looks.standard_error:.4f} on {looks.num_examples} training examples",
                "certificate "
                + (self.certificate.to_text() if self.certificate else "none: not asked for, or the budget ended"),
                f"coupling    {looks.coupling:.2g}"
                + ("; the edge has no part in it, so the prompt was chosen first" if self.is_sequential else ""),
                f"leaks       {leaks['leak_rate']:.2%} of {leaks['units']} marked values in all that was sent, "
                f"{leaks['leak_words']:.2%} as words of their own outside of what is public",
                *self._race_text(),
                *self._growth_text(),
                f"ended       by {self.reason}, after {looks.step} steps"
                + (f"; then the edge learnt anew for {self.num_refit_steps}" if self.num_refit_steps else ""),
                f"spent       {self.spent.calls:,} calls, {self.spent.tokens:,} tokens{shown_usd(self.spent.usd)}",
                self.taken.to_text(),
            ]
        )

    def _merging_text(self) -> list[str]:
        if self.merged_score is None or self.plain_score is None:
            return []
        scores = f"with the edge behind the cloud {self.merged_score:.3f}, the cloud's answers as they are "
        told = "kept" if self.is_merging else "left out, as it is not better"
        return [f"edge        {told}: {scores}{self.plain_score:.3f}"]

    def _race_text(self) -> list[str]:
        if self.race is None:
            return []
        left, count = len(self.race.left), self.race.num_examples
        return [f"race        {left} prompts left after {count} examples; the certificate compares those alone"]

    def _growth_text(self) -> list[str]:
        if not self.growths:
            return []
        written, joined, left = (
            sum(each.num_written for each in self.growths),
            sum(len(each.joined) for each in self.growths),
            sum(len(each.left) for each in self.growths),
        )
        ended = "; then there was no room in the budget for more" if self.growths[-1].ended_by_budget else ""
        return [f"growth      {written} prompts written, {joined} joined the pool and {left} left it{ended}"]


def project(
    pipeline: Pipeline,
    train: Sequence[PrivateExample],
    validation: Sequence[PrivateExample],
    variable: PromptVariable,
    *,
    budget: Budget | None = None,
    folder: Path | None = None,
    config: FitConfig | None = None,
    is_reflecting_here: bool = False,
    rewriter: RewriterConfig | None = None,
) -> Projection:
    """Say what a fit would cost; redacts everything and sends nothing.

    A pool is known from the start. Other variables write their prompts on the way: for them this is the cost of the
    first ones, and what holds is the budget.

    Args:
        folder: of a run that began; its answers cost nothing. None: of no run.
        config: how the fit goes; read for what a pool that grows may ask.
        is_reflecting_here: its prompts are written on the edge, so that only answers under them are asked for.
        rewriter: how one is tuned before; None: none is.

    Raises:
        RedactionError: an example or a prompt cannot be sent.
    """
    secret = folder / SECRET_FILE if folder is not None else None
    key = secret.read_bytes() if secret is not None and secret.is_file() else b"\0"
    cache = AnswerCache(folder / ANSWERS) if folder is not None and (folder / ANSWERS).is_dir() else None
    spent = Cost()
    if folder is not None and (folder / JOURNAL_FILE).is_file():
        with Purse(journal=folder / JOURNAL_FILE) as purse:
            spent = purse.spent
    examples = prepare_examples(pipeline, [*train, *validation], key)
    table, most, likely, num_cells, num_paid = AnswerTable(pipeline), Cost(), Cost(), 0, 0
    for prompt in variable.candidates(variable.start()):
        for example in examples:
            for request in table.requests(prompt, example):
                num_cells += 1
                if cache is not None and cache.get(request.digest) is not None:
                    num_paid += 1
                    continue
                most += pipeline.gate.most(request)
                tokens_in = len(request.payload) // _BYTES_PER_TOKEN
                tokens_out = int(request.max_tokens * _LIKELY_SHARE)
                usd = pipeline.gate.price.of(tokens_in, tokens_out)
                likely += Cost(calls=1, tokens_in=tokens_in, tokens_out=tokens_out, usd=usd)
    # Where all answers are there, it does not matter what of the budget they have used up.
    lacking = (budget or Budget()).missing(spent + most) if most.calls else ""
    num_prompts = 0
    if config is not None and config.growth is not None:
        num_prompts = config.growth.num_new * config.solve.num_growths
    return Projection(
        num_cells=num_cells,
        num_paid=num_paid,
        at_most=most,
        likely=likely,
        lacking=lacking,
        num_growth_calls=num_prompts
        * ((not is_reflecting_here) + sum(len(each.prepared.questions) for each in examples)),
        num_rewriter_calls=rewriter.most_calls(len(train), pipeline.config.max_questions) if rewriter else 0,
    )


def fit(
    pipeline: Pipeline,
    train: Sequence[PrivateExample],
    validation: Sequence[PrivateExample],
    metric: Metric,
    *,
    variable: PromptVariable,
    budget: Budget,
    folder: Path,
    edge: TunedEdge | None = None,
    make_rewriter: MakeRewriter | None = None,
    rewriter_settings: str = "",
    reflection: Reflection | None = None,
    config: FitConfig | None = None,
    resume: bool = False,
    on_refresh: Callable[[Refresh], None] = lambda _: None,
    on_refit: Callable[[int, int], None] = lambda done, total: None,
) -> FitResult:
    """Fit the prompt, and the edge where there is one.

    Args:
        pipeline: how requests travel; its gate's cloud, price and ledger are used, with the folder's budget and cache.
        train, validation: what f and F are measured on.
        metric: of final texts.
        variable: the prompt, such as a `PromptPool`.
        budget: never exceeded, over all runs in this folder.
        folder: of this run; a new one, unless `resume`.
        edge: None: the pipeline's merger is used, and there is nothing to tune but the prompt.
        make_rewriter: called before anything else is asked, such as with `tune_rewriter`; what it returns rewrites from
            then on. None: the pipeline's own rewriter, if it has one.
        rewriter_settings: how that one is made, in any words; a run goes on with the same alone.
        reflection: writes the prompts of a pool that grows; None: the pipeline's own cloud.
        config: how.
        resume: go on in a folder of the same examples, prompts and settings; only the budget may differ.
        on_refresh: told of each look at the constraint.
        on_refit: told of steps of the refit that are done, and of all.

    Raises:
        RedactionError: an example or a prompt cannot be sent; nothing was sent.
        BudgetError: the budget ended before there was anything to choose from.
        InputError: too few examples, or the folder is of another run.
        WireError: the cloud failed; run again with `resume`.
    """
    config = config or FitConfig()
    for name in ("race", "growth"):
        if getattr(config, name) is not None and not isinstance(variable, PromptPool):
            raise InputError(
                f"a {name} is asked for and the prompt variable is no pool, expected a PromptPool; leave {name} out"
            )
    if reflection is not None and config.growth is None:
        raise InputError("reflection is given and the pool does not grow, expected growth in the config; add it")
    num_held = round(config.certificate_share * len(train))
    if len(train) - num_held < 1 or not validation:
        raise InputError(
            f"there are {len(train)} training and {len(validation)} validation examples, of the first {num_held} for "
            "the certificate; expected at least one of each beside them"
        )
    named = ([reflection.name] if reflection else []) + ([rewriter_settings] if rewriter_settings else [])
    if edge is not None:
        # Rank and seed of the adapter are in its first numbers.
        named += [edge.name, hashlib.sha256(edge.start().tobytes()).hexdigest()]
    parts: tuple[bool | str, ...] = (make_rewriter is not None, *named)
    fingerprint = _fingerprint(pipeline, train, validation, variable, config, parts)
    key = _open_folder(folder, fingerprint, resume=resume)
    with ExitStack() as stack:
        purse = stack.enter_context(Purse(budget, journal=folder / JOURNAL_FILE))
        sent = stack.enter_context(SentLog(folder / SENT_FILE))
        cache = AnswerCache(folder / ANSWERS, max_bytes=config.cache_bytes, evicts=False)
        gate = pipeline.gate.within(purse=purse, cache=cache, sent=sent)
        pipeline = pipeline.through(gate)
        if edge is not None:
            edge.count_in(gate.account)
        variable.count_in(gate.account)
        reflect, rewriter_cost = None, Cost()
        if config.growth is not None:
            reflect = (reflection or CloudReflection()).begin(pipeline, max_tokens=config.growth.max_tokens)
        if make_rewriter is not None:
            # Each request is rewritten once, so that afterwards answers are asked for by prompt alone.
            pipeline = pipeline.rewriting(make_rewriter(pipeline, train[: len(train) - num_held], key))
            rewriter_cost = _kept_cost(folder / _REWRITER_COST_FILE, purse.spent)
        examples = prepare_examples(pipeline, [*train, *validation], key)
        searched, held, judged = (
            examples[: len(train) - num_held],
            examples[len(train) - num_held : len(train)],
            examples[len(train) :],
        )
        losses: EdgeLosses = MetricLosses(pipeline, metric) if edge is None else edge
        table = AnswerTable(pipeline)
        first, raced, racers = variable.best(variable.start()), None, list[str]()
        if config.race is not None and isinstance(variable, PromptPool):
            racers = list(variable.prompts)
            racing = TextProblem(pipeline, variable, losses, searched, judged, metric, config.losses, table)
            raced = race(
                variable.prompts,
                len(searched),
                lambda prompts, part: racing.losses(losses.start(), prompts, searched[part]),
                config.race,
            )
            variable = PromptPool(raced.left)
        looked = SearchExamples(train=searched, validation=judged, rest=[])
        if isinstance(variable, PromptPool):
            looked = _looked(table, gate, variable, racers, (searched, held, judged), config, before=rewriter_cost)
        problem = TextProblem(pipeline, variable, losses, looked.train, looked.validation, metric, config.losses, table)
        progress = stack.enter_context((folder / PROGRESS_FILE).open("w", encoding="utf-8"))

        def told(seen: Refresh) -> None:
            line = {**asdict(seen), "calls": purse.spent.calls, "tokens": purse.spent.tokens, "usd": purse.spent.usd}
            progress.write(json.dumps(line) + "\n")
            progress.flush()
            on_refresh(seen)

        growth = None
        if config.growth is not None and reflect is not None:
            growth = PoolGrowth(pipeline, problem, looked.train, config.growth, reflect=reflect, key=key)
        found = solve(problem, losses.start(), variable.start(), config.solve, on_refresh=told, grow=growth)
        variable = problem.variable
        prompt = variable.best(found.y)
        judge = _Judge(pipeline, edge, metric, problem.table)
        settled, scored = _Settled(x=found.x), looked.validation
        if edge is not None:
            ask_rest(table, variable.candidates(found.y), prompt, held, looked.rest)
            whole = (searched, held, judged)
            settled = _settle(problem, judge, edge, prompt, found, whole, looked.train, config, on_refit)
        is_dropped = edge is not None and not settled.is_better and not config.always_merges
        score = judge.plain_score(prompt, scored) if is_dropped else judge.score(prompt, settled.x, scored)
        result = FitResult(
            prompt=prompt,
            x=settled.x,
            score=score,
            start_score=judge.score(first, losses.start(), scored),
            merged_score=settled.merged,
            plain_score=settled.plain,
            is_merging=edge is not None and not is_dropped,
            certificate=_certify(problem, variable, settled.x, found.y, held, config),
            leaks=measure_leaks(
                [example.private for example in (*train, *validation)],
                sent.payloads,
                [text for example in (*train, *validation) for text in example.public],
            ),
            reason=found.reason,
            num_refit_steps=settled.num_refit_steps,
            num_searched=len(looked.train) + len(looked.validation),
            is_sequential=found.is_sequential,
            history=found.history,
            spent=purse.spent,
            taken=gate.account.taken(),
            race=raced,
            growths=tuple(growth.growths) if growth else (),
        )
        with replacing(folder / RESULT_FILE) as unfinished:
            unfinished.write_text(json.dumps(result.to_json(), ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
        return result


def prepare_examples(pipeline: Pipeline, examples: Sequence[PrivateExample], key: bytes) -> list[FitExample]:
    """Redact, rewrite and, in parallel, draft every request, in order, once and for all; nothing is sent.

    Args:
        key: secret; the same one gives the same placeholders again, whoever lacks it can tell nothing from them.

    Raises:
        RedactionError: one cannot be sent.
    """
    # Numbers that were given out before would be left out, and the same run would send other texts.
    prepared, redactor, is_parallel = [], pipeline.redactor.anew(), pipeline.config.mode == "parallel"
    for index, example in enumerate(examples):
        seed = hashlib.blake2b(f"{index}".encode(), key=key).digest()
        one = pipeline.prepare(example.request, random.Random(seed), redactor=redactor)
        draft = pipeline.drafter.draft(example.request) if is_parallel and pipeline.drafter else None
        prepared.append(FitExample(example, one, one.request.redact(example.target).text, draft))
    return prepared


def _kept_cost(file: Path, cost: Cost) -> Cost:
    """What it was when the run came here first: a run that goes on has paid for more."""
    if not file.is_file():
        with replacing(file) as unfinished:
            unfinished.write_text(json.dumps(asdict(cost)) + "\n", encoding="utf-8")
    try:
        return Cost.from_fields(json.loads(file.read_bytes()))
    except ValueError:
        raise DataError("is no cost; start in another folder", path=file) from None


def _looked(
    table: AnswerTable,
    gate: CloudGate,
    pool: PromptPool,
    raced: Sequence[str],
    parts: tuple[Sequence[FitExample], Sequence[FitExample], Sequence[FitExample]],
    config: FitConfig,
    *,
    before: Cost,
) -> SearchExamples:
    """What the search of a pool looks at, within what the budget leaves after a race of these prompts."""
    searched, held, judged = parts
    race_costs = [table.cost(gate, prompt, each) for prompt in raced for each in searched if table.knows(prompt, each)]
    grown = config.growth.num_new * config.solve.num_growths if config.growth is not None else 0
    return search_examples(
        table,
        gate,
        pool.prompts,
        searched,
        judged,
        held=held,
        num_prompts=len(pool.prompts) + grown,
        # Each prompt that joins was asked for; how many tokens that takes depends on what will be shown.
        before=sum(race_costs, before) + Cost(calls=grown),
    )


@dataclass(frozen=True, kw_only=True)
class _Settled:
    """The edge to ship, with what tells whether it helps."""

    x: Vector
    merged: float | None = None
    plain: float | None = None
    num_refit_steps: int = 0

    @property
    def is_better(self) -> bool:
        """Whether it is better than the cloud's answers as they are, as far as is known."""
        return self.merged is None or self.plain is None or self.merged > self.plain


def _settle(
    problem: TextProblem,
    judge: _Judge,
    edge: TunedEdge,
    prompt: str,
    found: Solution,
    parts: tuple[Sequence[FitExample], Sequence[FitExample], Sequence[FitExample]],
    compared: Sequence[FitExample],
    config: FitConfig,
    on_refit: Callable[[int, int], None],
) -> _Settled:
    """The search's x, or a refit where that gains more and the prompt stays within the tolerance; asks nothing new."""
    searched, held, judged = ([each for each in part if problem.table.knows(prompt, each)] for part in parts)
    # The search's x learnt from the validation examples: those of training tell whether it helps.
    seen = [*searched, *held] or parts[2]
    ours = _Settled(x=found.x, merged=judge.score(prompt, found.x, seen), plain=judge.plain_score(prompt, seen))
    if config.refit is None:
        return ours
    # Those that are held back stay unseen, as the certificate is about this edge.
    cells = judge.cells(prompt, [*searched, *judged])
    solving = config.solve
    again = refit(
        edge,
        cells,
        judge.plain_scores(cells),
        judge.scores,
        LearnConfig(
            make_rule=solving.make_rule,
            rate=solving.x_rate,
            num_batch_examples=config.losses.num_batch_examples,
            max_norm=solving.max_norm,
            seed=config.losses.seed,
        ),
        config.refit,
        on_step=on_refit,
    )
    if again is None:
        return ours
    gain = 0.0 if ours.merged is None or ours.plain is None else ours.merged - ours.plain
    if again.merged - again.plain <= (gain if config.always_merges else max(gain, 0.0)):
        return ours
    if not _stays(problem, prompt, again.x, found.y, compared, solving):
        return ours
    return _Settled(x=again.x, merged=again.merged, plain=again.plain, num_refit_steps=again.num_steps)


def _stays(
    problem: TextProblem,
    prompt: str,
    x: Vector,
    y: Vector,
    examples: Sequence[FitExample],
    config: SolveConfig,
) -> bool:
    """Whether nothing tells that another prompt is better for itself at this x than the tolerance allows."""
    variable, table = problem.variable, problem.table
    prompts = [each for each in variable.candidates(y) if all(table.knows(each, one) for one in examples)]
    if config.constraint == "none" or len(examples) < 2 or prompt not in prompts:
        return True
    losses = problem.losses(x, prompts, examples)
    gaps = losses[prompts.index(prompt)] - losses[int(losses.mean(1).argmin())]
    return float(gaps.mean()) <= config.tolerance + one_sided_margin(gaps)


class _Judge:
    """Scores final texts."""

    def __init__(self, pipeline: Pipeline, edge: TunedEdge | None, metric: Metric, table: AnswerTable) -> None:
        self._pipeline, self._edge, self._metric, self._table = pipeline, edge, metric, table

    def score(self, prompt: str, x: Vector, examples: Sequence[FitExample]) -> float | None:
        """The mean metric; None where the budget does not reach."""
        cells = self._asked(prompt, examples)
        if cells is None:
            return None
        if self._edge is None:
            merged = [self._pipeline.merge(cell.example.prepared, cell.job) for cell in cells]
            return float(self._of_final(merged, cells).mean())
        return float(self.scores(self._edge.write(x, [cell.job for cell in cells]), cells).mean())

    def plain_score(self, prompt: str, examples: Sequence[FitExample]) -> float | None:
        """The same of the cloud's answers as they are."""
        cells = self._asked(prompt, examples)
        return None if cells is None else float(self.plain_scores(cells).mean())

    def scores(self, written: Sequence[str], cells: Sequence[Cell]) -> Vector:
        """Of each text that is not yet restored."""
        pairs = zip(cells, written, strict=True)
        return self._of_final([cell.example.prepared.request.restore(text) for cell, text in pairs], cells)

    def plain_scores(self, cells: Sequence[Cell]) -> Vector:
        """Of the cloud's answers of each cell."""
        plain = JoinAnswers()
        return self.scores([plain.merge(cell.job) for cell in cells], cells)

    def cells(self, prompt: str, examples: Sequence[FitExample]) -> list[Cell]:
        """Of examples that were answered."""
        answers = self._table.answers
        return [Cell(each, tuple(answer.text for answer in answers(prompt, each))) for each in examples]

    def _asked(self, prompt: str, examples: Sequence[FitExample]) -> list[Cell] | None:
        try:
            self._table.fill([prompt], examples)
        except BudgetError:
            return None
        return self.cells(prompt, examples)

    def _of_final(self, texts: Sequence[str], cells: Sequence[Cell]) -> Vector:
        pairs = zip(texts, cells, strict=True)
        return np.array([self._metric(text, [cell.example.source.target]) for text, cell in pairs], np.float64)


def _certify(
    problem: TextProblem,
    variable: PromptVariable,
    x: Vector,
    y: Vector,
    held: Sequence[FitExample],
    config: FitConfig,
) -> Certificate | None:
    if len(held) < 2:
        return None
    prompts = variable.candidates(y)
    try:
        losses = problem.losses(x, prompts, held)
    except BudgetError:
        return None
    chosen = prompts.index(variable.best(y))
    return certify(losses.clip(0, 1), chosen, tolerance=config.solve.tolerance, delta=config.delta)


def _fingerprint(
    pipeline: Pipeline,
    train: Sequence[PrivateExample],
    validation: Sequence[PrivateExample],
    variable: PromptVariable,
    config: FitConfig,
    parts: tuple[bool | str, ...],
) -> str:
    """Tells one run from another."""
    texts = [(each.request, each.target) for each in (*train, *validation)]
    prompts = variable.candidates(variable.start())
    settings = (pipeline.config, replace(config, cache_bytes=1), *parts)
    about = (*settings, len(train), texts, type(variable).__name__, prompts)
    return hashlib.sha256(repr(about).encode()).hexdigest()


def _open_folder(folder: Path, fingerprint: str, *, resume: bool) -> bytes:
    """The secret of the run in this folder; a new one where there is no run."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / RUN_FILE).exists():
            if not (folder / SECRET_FILE).exists():
                write_new(folder / SECRET_FILE, secrets.token_bytes(32))
            write_new(folder / RUN_FILE, json.dumps({"fingerprint": fingerprint}).encode())
        elif not resume:
            raise InputError(f"{folder} holds a run already; go on with resume, or choose another folder")
        if json.loads((folder / RUN_FILE).read_bytes()) != {"fingerprint": fingerprint}:
            raise InputError(
                f"{folder} holds a run with other examples, prompts or settings; resume with the same ones (the budget "
                "may differ), or choose another folder"
            )
        return (folder / SECRET_FILE).read_bytes()
    except (OSError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"the run folder {folder} cannot be used: {error}; choose another") from error

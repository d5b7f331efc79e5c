"""Tune the edge before the cloud: by rewrites that the cloud answered better than the request as it is.

    r -> u_1 .. u_G, drawn from the edge at x -> each through the redactor -> cloud -> loss of what comes of its answer
    accepted: the best u of a request whose loss is smaller than that of r by a margin
    x <- descent on -log p(u | r) of the accepted ones; then the same again, drawn at the new x

No gradient comes through a cloud that takes text, so that the cloud scores and the edge learns from what scored well
(expert iteration; the first half of what Matryoshka Pilot, arXiv 2410.20749, does, whose second half, DPO on pairs, is
not here). A request costs G + 1 questions in a round, fewer where rewrites repeat. A rewrite in which a marked unit
would be sent is thrown away before anything is asked.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

import numpy as np

from cotune.errors import BudgetError, InputError
from cotune.sandwich.bilevel.problem import Vector
from cotune.sandwich.bilevel.step_rules import AdamRule, clipped
from cotune.sandwich.chat import ChatAnswer
from cotune.sandwich.cost import Cost
from cotune.sandwich.examples import PrivateExample
from cotune.sandwich.leak import measure_leaks
from cotune.sandwich.pipeline import MergeJob, Pipeline, Prepared

_MAX_NORM = 10.0


class RewritingEdge(Protocol):
    """An edge model that draws texts and learns from some: `EdgeAdapter`."""

    def sample_after(self, x: Vector, prompts_as_text: Sequence[str], *, temperature: float, seed: int) -> list[str]:
        """One drawn text after each."""
        ...

    def gradient_after(
        self, x: Vector, pairs: Sequence[tuple[str, str]], weights: Vector, step: int
    ) -> tuple[Vector, Vector]:
        """Losses of texts after others, and the slope along x of their weighted sum."""
        ...


@dataclass(frozen=True, kw_only=True)
class RewriterConfig:
    """How a rewriter is tuned."""

    num_rounds: int = 2
    """Of drawing, asking, learning."""
    num_samples: int = 3
    """G: rewrites of a request in a round."""
    num_batch_examples: int = 8
    """Requests of a round."""
    temperature: float = 1.0
    """Of the draws."""
    margin: float = 0.0
    """By how much a rewrite's loss must be smaller than the request's own, of 1."""
    num_steps: int = 10
    """Of descent in a round, each on all rewrites accepted so far."""
    x_rate: float = 1e-2
    """Of Adam."""
    max_share: float = 0.5
    """Of the budget's calls, tokens and dollars that may be spent when another request is begun; 1 for all of it."""
    seed: int = 0
    """Of the draws."""

    def __post_init__(self) -> None:
        for name in ("num_rounds", "num_samples", "num_batch_examples", "num_steps"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name)}, expected at least 1")
        for name in ("temperature", "x_rate"):
            if not 0 < getattr(self, name) < np.inf:
                raise InputError(f"{name} is {getattr(self, name)}, expected a positive number")
        if not 0 <= self.margin < 1:
            raise InputError(f"margin is {self.margin}, expected a share of 0 or more and below 1")
        if not 0 < self.max_share <= 1:
            raise InputError(f"max_share is {self.max_share}, expected a share above 0 and at most 1")


@dataclass(frozen=True)
class RewriteRound:
    """What came of a round.

    Attributes:
        num_requests: that the cloud answered as they are.
        num_rewrites: other questions that it was asked.
        num_leaks: rewrites that were thrown away, since a marked unit would have been sent.
        num_accepted: requests with a rewrite that was better.
        loss, best_loss: means of the requests as they are, and of the best of them and their rewrites.
    """

    num_requests: int
    num_rewrites: int
    num_leaks: int
    num_accepted: int
    loss: float
    best_loss: float


@dataclass(frozen=True)
class TunedRewriter:
    """A tuned rewriter.

    Attributes:
        x: its numbers; those to begin with where nothing was accepted.
        rounds: in order; the last one is left out where the budget ended in its first request.
        ended_by_budget: whether there was no room for all of them, in the budget or in the tuning's share of it.
    """

    x: Vector = field(repr=False)
    rounds: tuple[RewriteRound, ...]
    ended_by_budget: bool

    def to_json(self) -> dict[str, Any]:
        """All but x."""
        return {"rounds": [asdict(each) for each in self.rounds], "ended_by_budget": self.ended_by_budget}

    def to_text(self) -> str:
        """A line for people."""
        asked, better = sum(each.num_requests for each in self.rounds), sum(each.num_accepted for each in self.rounds)
        rewrites = sum(each.num_rewrites for each in self.rounds)
        ended = "; then its share of the budget was spent" if self.ended_by_budget else ""
        return f"rewriter    {better} of {asked} requests had a better one among {rewrites} rewrites{ended}"


def tune_rewriter(
    edge: RewritingEdge,
    pipeline: Pipeline,
    x: Vector,
    examples: Sequence[PrivateExample],
    metric: Callable[[str, Sequence[str]], float],
    template: str,
    config: RewriterConfig,
    *,
    key: bytes,
) -> TunedRewriter:
    """Tune; the pipeline's prompt and merger stay as they are.

    Args:
        edge: draws and learns.
        pipeline: through whose gate the cloud is asked, with its budget; its own rewriter is not used.
        x: numbers of the edge to begin with.
        examples: to learn from; nothing that is certified on.
        metric: of final texts; a loss is 1 less it.
        template: what the edge reads, with {request}: `edge_adapter.REWRITE_TEMPLATE`.
        config: how.
        key: secret; the same one gives the same placeholders, and so the same requests, again.

    Raises:
        RedactionError, WireError: a detector or the cloud failed; what was paid for is in the cache.
    """
    if not examples:
        raise InputError("there is no example to tune a rewriter on, expected at least one")
    plain, rule = pipeline.rewriting(None), AdamRule()
    share = _Share(plain, config.max_share)
    accepted: list[tuple[str, str]] = []
    rounds: list[RewriteRound] = []
    for number in range(config.num_rounds):
        generator = np.random.default_rng((config.seed, number))
        size = min(config.num_batch_examples, len(examples))
        tried: list[_Tried] = []
        ended = False
        try:
            for index in generator.choice(len(examples), size, replace=False):
                share.check()
                seed = hashlib.blake2b(f"rewrite {number} {index}".encode(), key=key).digest()
                tried.append(_try(edge, plain, share, x, examples[index], metric, template, config, generator, seed))
        except BudgetError:
            ended = True
        if tried:
            rounds.append(_round_of(tried))
            accepted += [(each.read, each.best) for each in tried if each.best is not None]
        for step in range(config.num_steps if accepted else 0):
            weights = np.full(len(accepted), 1 / len(accepted))
            _, slope = edge.gradient_after(x, accepted, weights, number * config.num_steps + step)
            x = rule.step(x, clipped(slope, _MAX_NORM), config.x_rate)
        if ended:
            return TunedRewriter(x, tuple(rounds), ended_by_budget=True)
    return TunedRewriter(x, tuple(rounds), ended_by_budget=False)


def questions_of(written: str) -> list[str]:
    """What a rewriter asks: one question a line.

    Example:
        >>> questions_of("one?\\n\\n two?")
        ['one?', ' two?']
    """
    return [line for line in written.splitlines() if line.strip()]


class _Share:
    """What tuning has cost by its answers, wherever they came from, so that a run that goes on ends at the same one."""

    def __init__(self, pipeline: Pipeline, share: float) -> None:
        self._pipeline, self._share = pipeline, share
        self._cost, self._counted = Cost(), set[str]()

    def add(self, prepared: Prepared, answers: Sequence[ChatAnswer]) -> None:
        gate = self._pipeline.gate
        for question, answer in zip(prepared.questions, answers, strict=True):
            request = self._pipeline.request_of(prepared, question)
            if request.digest in self._counted:
                continue
            self._counted.add(request.digest)
            most = gate.most(request)
            tokens_in = most.tokens_in if answer.tokens_in is None else answer.tokens_in
            tokens_out = most.tokens_out if answer.tokens_out is None else answer.tokens_out
            usd = gate.price.of(tokens_in, tokens_out)
            self._cost += Cost(calls=1, tokens_in=tokens_in, tokens_out=tokens_out, usd=usd)

    def check(self) -> None:
        """Refuse to begin another request where the share is spent: what comes after needs the rest."""
        for name in ("calls", "tokens", "usd"):
            limit = getattr(self._pipeline.gate.purse.budget, name)
            if limit is not None and getattr(self._cost, name) >= self._share * limit:
                raise BudgetError(f"the share of the budget's {name} that tuning a rewriter may take is spent")


@dataclass(frozen=True)
class _Tried:
    """A request and its rewrites; `best` is what was accepted."""

    read: str
    loss: float
    best_loss: float
    best: str | None
    num_rewrites: int
    num_leaks: int


@dataclass(frozen=True)
class _Written:
    """A rewriter that says what was written before."""

    text: str

    def rewrite(self, redacted: str) -> list[str]:
        return questions_of(self.text)


def _try(
    edge: RewritingEdge,
    pipeline: Pipeline,
    share: _Share,
    x: Vector,
    example: PrivateExample,
    metric: Callable[[str, Sequence[str]], float],
    template: str,
    config: RewriterConfig,
    generator: np.random.Generator,
    seed: bytes,
) -> _Tried:
    def prepared(line: Pipeline) -> Prepared:
        # The same placeholders for the request and for all its rewrites.
        return line.prepare(example.request, random.Random(seed), redactor=line.redactor.anew())

    def loss_of(one: Prepared) -> float:
        answers, _ = pipeline.ask(one)
        share.add(one, answers)
        text = pipeline.merge(one, MergeJob(example.request, tuple(answer.text for answer in answers)))
        return 1.0 - metric(text, [example.target])

    as_it_is = prepared(pipeline)
    loss = best_loss = loss_of(as_it_is)
    redacted = as_it_is.questions[0].value[0]["content"]
    read = template.replace("{request}", redacted)
    drawn = edge.sample_after(
        x, [read] * config.num_samples, temperature=config.temperature, seed=int(generator.integers(2**31))
    )
    best, num_rewrites, num_leaks = None, 0, 0
    for text in dict.fromkeys(each.strip() for each in drawn):
        if not text or text == redacted:
            continue
        rewritten = prepared(pipeline.rewriting(_Written(text)))
        sent = [question.payload.decode("utf-8", "replace") for question in rewritten.questions]
        if any(measure_leaks([example.private], sent, example.public).leaked_own):
            num_leaks += 1
            continue
        num_rewrites += 1
        found = loss_of(rewritten)
        if found < min(best_loss, loss - config.margin):
            best, best_loss = text, found
    return _Tried(read, loss, best_loss, best, num_rewrites, num_leaks)


def _round_of(tried: Sequence[_Tried]) -> RewriteRound:
    return RewriteRound(
        num_requests=len(tried),
        num_rewrites=sum(each.num_rewrites for each in tried),
        num_leaks=sum(each.num_leaks for each in tried),
        num_accepted=sum(each.best is not None for each in tried),
        loss=float(np.mean([each.loss for each in tried])),
        best_loss=float(np.mean([each.best_loss for each in tried])),
    )

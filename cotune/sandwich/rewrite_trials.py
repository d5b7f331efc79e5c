"""Rewrites of requests, tried: drawn at the edge, each through the redactor, to the cloud, and what came of it.

    r -> u_1 .. u_G, drawn from the edge at x -> each through the redactor -> cloud -> loss of what comes of its answer

A rewrite in which a marked unit would be sent is thrown away before anything is asked; it stays in the trial with a
loss of 1, so that one can learn not to write it. No question is asked twice, and all of them count towards the share of
the budget that tuning may take, wherever their answers came from, so that a run that goes on ends at the same one.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from cotune.errors import BudgetError, InputError
from cotune.sandwich.bilevel.problem import Vector
from cotune.sandwich.chat import ChatAnswer
from cotune.sandwich.cost import Cost
from cotune.sandwich.examples import PrivateExample
from cotune.sandwich.leak import measure_leaks
from cotune.sandwich.pipeline import MergeJob, Pipeline, Prepared


@dataclass(frozen=True)
class Preference:
    """Two texts after the same one, of which the first is to be preferred."""

    read: str
    better: str
    worse: str


class RewritingEdge(Protocol):
    """An edge model that writes texts and learns from some: `EdgeAdapter`."""

    def sample_after(self, x: Vector, prompts_as_text: Sequence[str], *, temperature: float, seed: int) -> list[str]:
        """One drawn text after each."""
        ...

    def write_after(self, x: Vector, prompts_as_text: Sequence[str]) -> list[str]:
        """The likeliest text after each, token by token."""
        ...

    def gradient_after(
        self, x: Vector, pairs: Sequence[tuple[str, str]], weights: Vector, step: int
    ) -> tuple[Vector, Vector]:
        """Losses of texts after others, and the slope along x of their weighted sum."""
        ...

    def log_probs_after(self, x: Vector, pairs: Sequence[tuple[str, str]]) -> Vector:
        """log p of whole texts after others."""
        ...

    def preference_losses(
        self, x: Vector, preferences: Sequence[Preference], reference: Vector, *, beta: float
    ) -> Vector:
        """Of each; the reference is log p of its two texts, float64 (preferences, 2)."""
        ...

    def preference_gradient(
        self, x: Vector, preferences: Sequence[Preference], reference: Vector, step: int, *, beta: float
    ) -> tuple[Vector, Vector]:
        """The same, and the slope along x of their mean."""
        ...


@dataclass(frozen=True, kw_only=True)
class DrawConfig:
    """How rewrites are drawn."""

    num_samples: int = 3
    """G: rewrites of a request in a round."""
    num_batch_examples: int = 8
    """Requests of a round."""
    temperature: float = 1.0
    """Of the draws."""
    seed: int = 0
    """Of the draws."""

    def __post_init__(self) -> None:
        for name in ("num_samples", "num_batch_examples"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name)}, expected at least 1")
        if not 0 < self.temperature < np.inf:
            raise InputError(f"temperature is {self.temperature}, expected a positive number")


@dataclass(frozen=True)
class Rewrite:
    """A rewrite, and what it is worth.

    Attributes:
        text: as the edge wrote it.
        loss: 1 less the metric of what came of it; 1 where it was not sent.
        leak: share of the request's marked units that would be sent, also by most of their words, outside of what is
            public: `cotune.sandwich.leak`.
        is_sent: the cloud was asked; else a unit would have been sent.
    """

    text: str
    loss: float
    leak: float
    is_sent: bool

    def score(self, leak_weight: float) -> float:
        """The smaller the better.

        Example:
            >>> Rewrite("Ann's town?", 1.0, 0.5, is_sent=False).score(2.0)
            2.0
        """
        return self.loss + leak_weight * self.leak


@dataclass(frozen=True)
class AskedRequest:
    """A request that the cloud answered as it is.

    Attributes:
        example: its source.
        seed: of its placeholders, and of those of its rewrites.
        read: what the edge reads to rewrite it.
        plain: the request itself, redacted, as a rewrite that changes nothing.
    """

    example: PrivateExample
    seed: bytes
    read: str
    plain: Rewrite


@dataclass(frozen=True)
class Trial:
    """A request and different rewrites of it, in the order in which they were written."""

    request: AskedRequest
    rewrites: tuple[Rewrite, ...]

    def best(self, margin: float) -> Rewrite | None:
        """The best rewrite, where its loss is smaller than that of the request as it is by more than a margin."""
        sent = [each for each in self.rewrites if each.is_sent]
        best = min(sent, key=lambda each: each.loss, default=None)
        return best if best is not None and best.loss < self.request.plain.loss - margin else None


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

    @classmethod
    def of(cls, trials: Sequence[Trial], margin: float) -> RewriteRound:
        """Of at least one trial."""
        plain = [each.request.plain for each in trials]
        best = [each.best(margin) for each in trials]
        rewrites = [(one, each.request.plain) for each in trials for one in each.rewrites]
        return cls(
            num_requests=len(trials),
            num_rewrites=sum(one.is_sent and one.text != itself.text for one, itself in rewrites),
            num_leaks=sum(not one.is_sent for one, _ in rewrites),
            num_accepted=sum(each is not None for each in best),
            loss=float(np.mean([each.loss for each in plain])),
            best_loss=float(np.mean([(one or itself).loss for one, itself in zip(best, plain, strict=True)])),
        )


class Trials:
    """Tries rewrites through a pipeline, each question once.

    Args:
        edge: writes.
        pipeline: through whose gate the cloud is asked; its own rewriter is not used.
        examples: to draw requests from.
        metric: of final texts; a loss is 1 less it.
        template: what the edge reads, with {request}.
        draw: how.
        key: secret; the same one gives the same placeholders, and so the same requests, again.

    Raises:
        InputError: there is no example.
    """

    def __init__(
        self,
        edge: RewritingEdge,
        pipeline: Pipeline,
        examples: Sequence[PrivateExample],
        metric: Callable[[str, Sequence[str]], float],
        template: str,
        draw: DrawConfig,
        *,
        key: bytes,
    ) -> None:
        if not examples:
            raise InputError("there is no example to tune a rewriter on, expected at least one")
        self._edge, self._pipeline, self._examples = edge, pipeline.rewriting(None), examples
        self._metric, self._template, self._draw, self._key = metric, template, draw, key
        self._answers: dict[tuple[str, ...], tuple[ChatAnswer, ...]] = {}
        self._counted, self._cost = set[str](), Cost()

    def draw(self, x: Vector, number: int, *, share: float) -> tuple[list[Trial], bool]:
        """A round: requests by its number, rewrites drawn at x.

        Args:
            share: of the budget's calls, tokens and dollars; no request is begun once it is spent.

        Returns:
            The trials, and whether there was no room for more of them, in the budget or in the share.

        Raises:
            RedactionError, WireError: a detector or the cloud failed; what was paid for is in the cache.
        """
        generator, tried, config = self.generator(number), list[Trial](), self._draw
        try:
            for index in self.choose(generator):
                request = self.ask(index, f"rewrite {number} {index}", share=share)
                seed = int(generator.integers(2**31))
                drawn = self._edge.sample_after(
                    x, [request.read] * config.num_samples, temperature=config.temperature, seed=seed
                )
                tried.append(self.try_texts(request, drawn))
        except BudgetError:
            return tried, True
        return tried, False

    def generator(self, number: int) -> np.random.Generator:
        """The draws of a round."""
        return np.random.default_rng((self._draw.seed, number))

    def choose(self, generator: np.random.Generator) -> list[int]:
        """Places of a round's examples, each once."""
        size = min(self._draw.num_batch_examples, len(self._examples))
        return [int(index) for index in generator.choice(len(self._examples), size, replace=False)]

    def ask(self, index: int, name: str, *, share: float) -> AskedRequest:
        """Ask an example's request as it is.

        Args:
            index: of the example.
            name: the same one gives the same placeholders.
            share: see `draw`.

        Raises:
            BudgetError: no room, or the share is spent.
        """
        self._check(share)
        example, seed = self._examples[index], hashlib.blake2b(name.encode(), key=self._key).digest()
        prepared = self._prepared(self._pipeline, example, seed)
        redacted = prepared.questions[0].value[0]["content"]
        leak, _ = self._leak(example, prepared)
        plain = Rewrite(redacted, self._loss(example, prepared), leak, is_sent=True)
        return AskedRequest(example, seed, self._template.replace("{request}", redacted), plain)

    def try_texts(self, request: AskedRequest, texts: Sequence[str]) -> Trial:
        """Ask with each of them instead; empty ones are none, and a copy of the request is worth what that is.

        Raises:
            BudgetError: no room.
        """
        rewrites = list[Rewrite]()
        for text in dict.fromkeys(each.strip() for each in texts):
            if not text:
                continue
            if text == request.plain.text:
                rewrites.append(request.plain)
                continue
            prepared = self._prepared(self._pipeline.rewriting(_Written(text)), request.example, request.seed)
            leak, is_sent = self._leak(request.example, prepared)
            loss = self._loss(request.example, prepared) if is_sent else 1.0
            rewrites.append(Rewrite(text, loss, leak, is_sent))
        return Trial(request, tuple(rewrites))

    def _prepared(self, pipeline: Pipeline, example: PrivateExample, seed: bytes) -> Prepared:
        # The same placeholders for the request and for all its rewrites.
        return pipeline.prepare(example.request, random.Random(seed), redactor=pipeline.redactor.anew())

    def _loss(self, example: PrivateExample, prepared: Prepared) -> float:
        requests = [self._pipeline.request_of(prepared, question) for question in prepared.questions]
        digests = tuple(each.digest for each in requests)
        if digests not in self._answers:
            self._answers[digests], _ = self._pipeline.ask(prepared)
            self._count(prepared, self._answers[digests])
        said = tuple(answer.text for answer in self._answers[digests])
        text = self._pipeline.merge(prepared, MergeJob(example.request, said))
        return 1.0 - self._metric(text, [example.target])

    def _leak(self, example: PrivateExample, prepared: Prepared) -> tuple[float, bool]:
        """The share of marked units that would be sent, and whether none would be as it stands."""
        sent = [question.payload.decode("utf-8", "replace") for question in prepared.questions]
        found = measure_leaks([example.private], sent, example.public)
        (whole,) = found.leaked_own
        return max(len(whole), found.num_fuzzy_own) / max(1, found.num_units), not whole

    def _count(self, prepared: Prepared, answers: Sequence[ChatAnswer]) -> None:
        """What an answer cost when it came, whoever paid for it."""
        gate = self._pipeline.gate
        for question, answer in zip(prepared.questions, answers, strict=True):
            request = self._pipeline.request_of(prepared, question)
            if request.digest in self._counted:
                continue
            self._counted.add(request.digest)
            self._cost += gate.cost_of(gate.most(request), answer)

    def _check(self, share: float) -> None:
        """Refuse to begin another request where the share is spent: what comes after needs the rest."""
        for name in ("calls", "tokens", "usd"):
            limit = getattr(self._pipeline.gate.purse.budget, name)
            if limit is not None and getattr(self._cost, name) >= share * limit:
                raise BudgetError(f"the share of the budget's {name} that tuning a rewriter may take is spent")


def questions_of(written: str) -> list[str]:
    """What a rewriter asks: one question a line.

    Example:
        >>> questions_of("one?\\n\\n two?")
        ['one?', ' two?']
    """
    return [line for line in written.splitlines() if line.strip()]


@dataclass(frozen=True)
class _Written:
    """A rewriter that says what was written before."""

    text: str

    def rewrite(self, redacted: str) -> list[str]:
        return questions_of(self.text)

"""Prompts and an edge adapter as a bilevel problem: losses of requests that went through the pipeline.

    F(x, y) = mean over validation of loss(z) + rho/2 ||x||^2
    f(x, y) = mean over training of [loss(z) + w_c loss(c) + w_t tokens(c)] / (1 + w_c + w_t)

loss(z) is the edge's, in [0, 1]; loss(c) = 1 - metric of the cloud's answers alone; tokens(c) its length as a share of
the longest allowed. So f is in [0, 1] for each example. Each request is redacted once, and answers are kept:
moving x asks nothing of the cloud, moving y asks what was never asked.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from cotune.errors import InputError
from cotune.sandwich.bilevel.problem import Sloped, Vector
from cotune.sandwich.chat import ChatAnswer, ChatRequest
from cotune.sandwich.cloud_gate import CloudGate
from cotune.sandwich.cost import Cost
from cotune.sandwich.examples import PrivateExample
from cotune.sandwich.pipeline import MergeJob, Pipeline, Prepared
from cotune.sandwich.prompts.variable import PromptVariable

Metric = Callable[[str, Sequence[str]], float]
"""A text against its references, in [0, 1], higher is better: `cotune.evaluation.token_f1` and its like."""
_TRAIN, _VALIDATION, _GAP = range(3)


@dataclass(frozen=True)
class FitExample:
    """A request, ready to be sent under any prompt.

    Attributes:
        source: as it was given.
        prepared: redacted and rewritten.
        target: z as it should be before it is restored: with this request's placeholders.
        draft: the edge's own answer, where the mode is parallel.
    """

    source: PrivateExample
    prepared: Prepared
    target: str
    draft: str | None = None


@dataclass(frozen=True)
class Cell:
    """One example under one prompt: what the edge reads, and what it should write."""

    example: FitExample
    answers: tuple[str, ...]

    @property
    def job(self) -> MergeJob:
        """For a merger."""
        return MergeJob(self.example.source.request, self.answers, self.example.draft)


class EdgeLosses(Protocol):
    """The half behind the cloud, as a function of its numbers x."""

    def start(self) -> Vector:
        """x to begin with; of length 0 where there is nothing to tune."""
        ...

    def losses(self, x: Vector, cells: Sequence[Cell]) -> Vector:
        """In [0, 1] for each cell."""
        ...

    def gradient(self, x: Vector, cells: Sequence[Cell], weights: Vector, step: int) -> tuple[Vector, Vector]:
        """The losses, and the slope along x of their weighted sum."""
        ...


class MetricLosses:
    """An edge without numbers to tune: 1 - metric of what the pipeline's merger makes."""

    def __init__(self, pipeline: Pipeline, metric: Metric) -> None:
        self._pipeline, self._metric = pipeline, metric

    def start(self) -> Vector:
        return np.zeros(0)

    def losses(self, x: Vector, cells: Sequence[Cell]) -> Vector:
        texts = [self._pipeline.merge(cell.example.prepared, cell.job) for cell in cells]
        scores = [self._metric(text, [cell.example.source.target]) for text, cell in zip(texts, cells, strict=True)]
        return 1.0 - np.asarray(scores, np.float64)

    def gradient(self, x: Vector, cells: Sequence[Cell], weights: Vector, step: int) -> tuple[Vector, Vector]:
        return self.losses(x, cells), np.zeros(0)


@dataclass(frozen=True, kw_only=True)
class TextProblemConfig:
    """What the losses weigh."""

    num_batch_examples: int = 8
    """Of each step."""
    cloud_weight: float = 0.0
    """w_c."""
    token_weight: float = 0.0
    """w_t."""
    ridge: float = 0.0
    """rho."""
    seed: int = 0
    """Of the batches."""

    def __post_init__(self) -> None:
        if self.num_batch_examples < 1:
            raise InputError(f"num_batch_examples is {self.num_batch_examples}, expected at least 1")
        for name in ("cloud_weight", "token_weight", "ridge"):
            if not 0 <= getattr(self, name) < np.inf:
                raise InputError(f"{name} is {getattr(self, name)}, expected 0 or more")


class AnswerTable:
    """The cloud's answers by prompt and example, asked for when they are first wanted, many at once."""

    def __init__(self, pipeline: Pipeline) -> None:
        self._pipeline = pipeline
        self._known: dict[tuple[str, int], tuple[ChatAnswer, ...]] = {}

    def fill(self, prompts: Sequence[str], examples: Sequence[FitExample]) -> None:
        """Ask for what is not known.

        Raises:
            BudgetError, WireError: see `CloudGate.ask`.
        """
        wanted = [(prompt, example) for prompt in prompts for example in examples if not self.knows(prompt, example)]
        requests = [self.requests(prompt, example) for prompt, example in wanted]
        asked = iter(self._pipeline.ask_all([request for each in requests for request in each]))
        for (prompt, example), each in zip(wanted, requests, strict=True):
            self._known[prompt, id(example)] = tuple(next(asked).answer for _ in each)

    def requests(self, prompt: str, example: FitExample) -> list[ChatRequest]:
        """What a cell sends."""
        prepared = example.prepared
        return [self._pipeline.request_of(prepared, question, prompt) for question in prepared.questions]

    def knows(self, prompt: str, example: FitExample) -> bool:
        """Whether it was filled."""
        return (prompt, id(example)) in self._known

    def answers(self, prompt: str, example: FitExample) -> tuple[ChatAnswer, ...]:
        """Of a cell that was filled."""
        return self._known[prompt, id(example)]

    def cost(self, gate: CloudGate, prompt: str, example: FitExample) -> Cost:
        """Of a cell that was filled, whoever paid for it."""
        asked = zip(self.requests(prompt, example), self.answers(prompt, example), strict=True)
        return sum((gate.cost_of(gate.most(request), answer) for request, answer in asked), Cost())


class TextProblem:
    """F and f over requests; fits `BilevelProblem`.

    Args:
        pipeline: whose cloud answers.
        variable: the prompt; may be replaced by one with other places, see `Grow` of `bilevel.solve`.
        edge: the half behind the cloud.
        train, validation: examples; f reads the first, F the second.
        metric: of the cloud's answers alone, for `cloud_weight`.
        config: weights.
        table: answers that are there; None: none are.
    """

    def __init__(
        self,
        pipeline: Pipeline,
        variable: PromptVariable,
        edge: EdgeLosses,
        train: Sequence[FitExample],
        validation: Sequence[FitExample],
        metric: Metric,
        config: TextProblemConfig,
        table: AnswerTable | None = None,
    ) -> None:
        self._pipeline, self.variable, self._edge, self._metric = pipeline, variable, edge, metric
        self._splits, self._config = {_TRAIN: train, _VALIDATION: validation, _GAP: train}, config
        self.table = table or AnswerTable(pipeline)
        self._memory: dict[tuple[str, int], float] = {}
        self._memory_x: Vector | None = None

    def upper(self, x: Vector, y: Vector, step: int) -> Sloped:
        batch = self._batch(_VALIDATION, step)
        sloped = self._sloped(x, y, batch, step, is_lower=False)
        ridge = self._config.ridge
        return Sloped(sloped.value + ridge / 2 * float(x @ x), sloped.grad_x + ridge * x, sloped.grad_y)

    def lower(self, x: Vector, y: Vector, step: int) -> Sloped:
        return self._sloped(x, y, self._batch(_TRAIN, step), step, is_lower=True)

    def respond(self, x: Vector, y: Vector, step: int) -> Vector:
        batch = self._batch(_TRAIN, step)
        return self.variable.respond(y, lambda prompts: self.losses(x, prompts, batch).mean(1), step)

    def gaps(self, x: Vector, y: Vector, response: Vector, step: int) -> Vector:
        batch = self._batch(_GAP, step)
        sides = []
        for side in (y, response):
            mixture = self.variable.mixture(side, step)
            weights = np.array([weight for _, weight in mixture])
            sides.append(weights @ self.losses(x, [prompt for prompt, _ in mixture], batch))
        return np.asarray(sides[0] - sides[1])

    def score(self, x: Vector, y: Vector) -> float:
        """F of the one prompt that would be shipped, over all validation examples."""
        losses = self.losses(x, [self.variable.best(y)], self._splits[_VALIDATION], is_lower=False)
        return float(losses.mean()) + self._config.ridge / 2 * float(x @ x)

    def losses(
        self, x: Vector, prompts: Sequence[str], examples: Sequence[FitExample], *, is_lower: bool = True
    ) -> Vector:
        """Losses of each example under each prompt, in [0, 1]: float64 (prompts, examples).

        Args:
            is_lower: those of f; else those of the edge alone, as F has them.
        """
        self.table.fill(prompts, examples)
        keys = [(prompt, id(example)) for prompt in prompts for example in examples]
        self._remember(x)
        missing = [key for key in dict.fromkeys(keys) if key not in self._memory]
        if missing:
            by_id = {id(example): example for example in examples}
            cells, places = _distinct([self._cell(prompt, by_id[index]) for prompt, index in missing])
            self._memory.update(zip(missing, self._edge.losses(x, cells)[places].tolist(), strict=True))
        found = np.array([self._memory[key] for key in keys]).reshape(len(prompts), len(examples))
        if not is_lower:
            return found
        extra = [[self._cloud_loss(prompt, example) for example in examples] for prompt in prompts]
        return np.asarray((found + np.array(extra)) / self._scale)

    @property
    def _scale(self) -> float:
        return 1 + self._config.cloud_weight + self._config.token_weight

    def _sloped(self, x: Vector, y: Vector, batch: Sequence[FitExample], step: int, *, is_lower: bool) -> Sloped:
        mixture = self.variable.mixture(y, step)
        prompts = [prompt for prompt, _ in mixture]
        self.table.fill(prompts, batch)
        weights = np.repeat([weight for _, weight in mixture], len(batch)) / len(batch)
        cells, places = _distinct([self._cell(prompt, example) for prompt in prompts for example in batch])
        losses, grad_x = self._edge.gradient(x, cells, np.bincount(places, weights).astype(np.float64), step)
        self._remember(x)
        keys = [(prompt, id(example)) for prompt in prompts for example in batch]
        self._memory.update(zip(keys, losses[places].tolist(), strict=True))
        own = self.losses(x, prompts, batch, is_lower=is_lower)
        grad_y = self.variable.slope(y, lambda them: self.losses(x, them, batch, is_lower=is_lower).mean(1), step)
        return Sloped(float(weights @ own.ravel()), grad_x / (self._scale if is_lower else 1.0), grad_y)

    def _remember(self, x: Vector) -> None:
        """Losses of the edge hold for one x."""
        if self._memory_x is None or not np.array_equal(self._memory_x, x):
            self._memory, self._memory_x = {}, x.copy()

    def _cell(self, prompt: str, example: FitExample) -> Cell:
        return Cell(example, tuple(answer.text for answer in self.table.answers(prompt, example)))

    def _cloud_loss(self, prompt: str, example: FitExample) -> float:
        config, answers, loss = self._config, self.table.answers(prompt, example), 0.0
        if config.cloud_weight:
            text = example.prepared.request.restore("\n\n".join(answer.text for answer in answers))
            loss += config.cloud_weight * (1 - self._metric(text, [example.source.target]))
        if config.token_weight:
            longest = self._pipeline.config.max_tokens * len(answers)
            written = sum(min(answer.tokens_out or 0, self._pipeline.config.max_tokens) for answer in answers)
            loss += config.token_weight * written / longest
        return loss

    def _batch(self, split: int, step: int) -> list[FitExample]:
        examples = self._splits[split]
        size = min(self._config.num_batch_examples, len(examples))
        generator = np.random.default_rng((self._config.seed, split, step))
        return [examples[index] for index in sorted(generator.choice(len(examples), size, replace=False).tolist())]


def _distinct(cells: Sequence[Cell]) -> tuple[list[Cell], NDArray[np.intp]]:
    """Cells with equal answers, as a good cloud gives them under several prompts, once; and the place of each."""
    numbers: dict[tuple[int, tuple[str, ...]], int] = {}
    places, found = [], list[Cell]()
    for cell in cells:
        places.append(numbers.setdefault((id(cell.example), cell.answers), len(found)))
        found += [cell] if len(numbers) > len(found) else []
    return found, np.array(places, np.intp)

"""The edge learns once more under the prompt that was chosen, from all examples, and folds tell how long and whether.

The search moves x on the validation examples alone, as it compares prompts on the others. Where there are dozens of
examples, each one counts: here the edge begins anew, under one prompt, and learns from both. Each fold of the examples
is written by an edge that learnt from the other folds, after a quarter, a half and all of the steps; the best of these
looks, against the cloud's answers as they are on the same examples, is how long the edge learns from all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import count, islice
from typing import Any, Protocol

import numpy as np

from cotune.errors import InputError
from cotune.sandwich.bilevel.problem import Vector
from cotune.sandwich.bilevel.step_rules import XRule, clipped
from cotune.sandwich.text_problem import Cell, EdgeLosses

_LOOKS = (0.25, 0.5, 1.0)

Score = Callable[[Sequence[str], Sequence[Cell]], Vector]
"""The metric of texts that an edge wrote for these cells, each in [0, 1]."""


class WritingEdge(EdgeLosses, Protocol):
    """An edge that also writes."""

    def write(self, x: Vector, jobs: Sequence[Any]) -> list[str]:
        """z of each job, not yet restored."""
        ...


@dataclass(frozen=True, kw_only=True)
class LearnConfig:
    """How the edge learns from cells."""

    make_rule: Callable[[], XRule]
    """Of steps; a new one for each course."""
    rate: float
    """Of the rule."""
    num_batch_examples: int
    """Of one step."""
    max_norm: float = 10.0
    """That slopes are clipped to."""
    seed: int = 0
    """Of the batches."""


@dataclass(frozen=True, kw_only=True)
class RefitConfig:
    """For how long."""

    num_steps: int = 160
    """At most."""
    num_folds: int = 4
    """Courses that are judged; with fewer examples, one for each."""

    def __post_init__(self) -> None:
        if self.num_steps < len(_LOOKS):
            raise InputError(f"num_steps of a refit is {self.num_steps}, expected at least {len(_LOOKS)}")
        if self.num_folds < 2:
            raise InputError(f"num_folds of a refit is {self.num_folds}, expected at least 2")

    @property
    def looks(self) -> list[int]:
        """Steps after which each course is judged."""
        return [max(1, round(share * self.num_steps)) for share in _LOOKS]


@dataclass(frozen=True, kw_only=True)
class Refit:
    """What came of it.

    Attributes:
        x: learnt from all cells.
        num_steps: for so long.
        merged, plain: mean metric over all cells, each written by an edge that had not seen it, and of the cloud's
            answers as they are.
    """

    x: Vector = field(repr=False)
    num_steps: int
    merged: float
    plain: float


def learning_steps(edge: EdgeLosses, x: Vector, cells: Sequence[Cell], config: LearnConfig) -> Iterator[Vector]:
    """x after each step, without end; each epoch has every cell once, in batches of much the same length.

    Raises:
        InputError: there is no cell.
    """
    if not cells:
        raise InputError("there is nothing to train the edge on, expected at least one example")
    rule, step = config.make_rule(), count()
    num_batches = -(-len(cells) // config.num_batch_examples)
    for epoch in count():
        order = np.random.default_rng((config.seed, epoch)).permutation(len(cells))
        for part in np.array_split(order, num_batches):
            batch = [cells[index] for index in sorted(part.tolist())]
            _, slope = edge.gradient(x, batch, np.full(len(batch), 1 / len(batch)), next(step))
            x = rule.step(x, clipped(slope, config.max_norm), config.rate)
            yield x


def refit(
    edge: WritingEdge,
    cells: Sequence[Cell],
    plain: Vector,
    score: Score,
    learn: LearnConfig,
    config: RefitConfig,
    *,
    on_step: Callable[[int, int], None] = lambda done, total: None,
) -> Refit | None:
    """Learn from all cells, for as long as folds of them say; None where there are fewer than two.

    Args:
        edge: begins at its start in each course.
        cells: of one prompt.
        plain: metric of the cloud's answers as they are, float64 (cells,).
        score: of what the edge writes.
        learn, config: how, and for how long.
        on_step: told of steps that are done, and of all.

    Example:
        >>> found = refit(edge, cells, plain, score, learn, RefitConfig(num_steps=80))   # doctest: +SKIP
        >>> found.num_steps, found.merged > found.plain
        (40, True)
    """
    num_folds = min(config.num_folds, len(cells))
    if num_folds < 2:
        return None
    folds = np.random.default_rng(learn.seed).permutation(len(cells)) % num_folds
    scores, looks = np.zeros((len(config.looks), len(cells))), config.looks
    done, most = count(1), (num_folds + 1) * config.num_steps
    for fold in range(num_folds):
        held = np.flatnonzero(folds == fold)
        others = [cell for cell, place in zip(cells, folds, strict=True) if place != fold]
        judged = [cell for cell, place in zip(cells, folds, strict=True) if place == fold]
        for step, x in enumerate(islice(learning_steps(edge, edge.start(), others, learn), config.num_steps), 1):
            on_step(next(done), most)
            for look in (place for place, after in enumerate(looks) if after == step):
                scores[look, held] = score(edge.write(x, [cell.job for cell in judged]), judged)
    best = int(scores.mean(1).argmax())
    for last in islice(learning_steps(edge, edge.start(), cells, learn), looks[best]):  # noqa: B007
        on_step(next(done), most)
    return Refit(x=last, num_steps=looks[best], merged=float(scores[best].mean()), plain=float(plain.mean()))

"""Which examples the search looks at, where a budget does not pay for all of them under every prompt.

Prompts are compared on examples that were asked under all of them, and the edge learns from answers under the one that
is chosen. So n of N examples are for the search, and the others wait for the prompt: with p prompts and answers of one
price, n p + (N - n) answers are what the budget pays for. Where it does not pay for that either, half of it is the
search's. What an answer costs is seen on the first examples, as a share of the most that it could have cost.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cotune.errors import BudgetError
from cotune.sandwich.cloud_gate import CloudGate
from cotune.sandwich.cost import Cost
from cotune.sandwich.text_problem import AnswerTable, FitExample

_NUM_PROBES = 4
"""Examples that tell what an answer costs."""
_NUM_AT_ONCE = 8
_SPARE = 0.05
"""Of the budget, as answers differ."""
_SEARCH_SHARE = 0.5
"""Of a budget that does not pay for every example under one prompt."""
_MIN_TRAIN = 2
"""As one loss has no standard error."""
_TINY = 1e-300

Amounts = NDArray[np.float64]
"""Calls, tokens and dollars on the last axis."""


@dataclass(frozen=True, kw_only=True)
class SearchExamples:
    """A split of the examples.

    Attributes:
        train, validation: that the search looks at, under every prompt.
        rest: that wait for the prompt which is chosen.
    """

    train: list[FitExample]
    validation: list[FitExample]
    rest: list[FitExample]


def search_examples(
    table: AnswerTable,
    gate: CloudGate,
    prompts: Sequence[str],
    train: Sequence[FitExample],
    validation: Sequence[FitExample],
    *,
    held: Sequence[FitExample] = (),
    num_prompts: int | None = None,
    before: Cost | None = None,
) -> SearchExamples:
    """All of them where the budget may pay for that; else as many as it pays for, in their order.

    It depends on answers alone, and not on when they were paid for: a run that goes on splits as it did before.

    Args:
        table: asked for the first examples under every prompt, where the budget may not pay for all.
        gate: whose prices count, and the budget of the whole run; its seconds are not looked at.
        prompts: to choose from.
        train, validation: examples in their order.
        held: are asked under every prompt as well, at the end.
        num_prompts: that there will be at most; None: these.
        before: what is spent on other things.

    Raises:
        BudgetError: not even for the first examples.
        WireError: see `CloudGate.ask`.

    Example:
        >>> found = search_examples(table, gate, prompts, train, validation)   # doctest: +SKIP
        >>> len(found.train), len(found.validation), len(found.rest)
        (8, 16, 72)
    """
    everything = SearchExamples(train=list(train), validation=list(validation), rest=[])
    spent = _amounts(before or Cost())
    budget = gate.purse.budget
    left = np.array([np.inf if each is None else each for each in (budget.calls, budget.tokens, budget.usd)]) - spent
    if np.isinf(left).all():
        return everything
    growth = max(1.0, (num_prompts or 0) / len(prompts))
    order = in_turn(train, validation)
    most = np.array([[_most(table, gate, prompt, each) for prompt in prompts] for each in order])
    of_held = (
        np.array([[_most(table, gate, prompt, each) for prompt in prompts] for each in held]).reshape(-1, 3).sum(0)
    )
    if (growth * most.sum((0, 1)) + of_held <= left).all():
        return everything
    probes = order[:_NUM_PROBES]
    table.fill(prompts, probes)
    paid = sum((table.cost(gate, prompt, each) for each in probes for prompt in prompts), Cost())
    share = _amounts(paid) / np.maximum(most[: len(probes)].sum((0, 1)), _TINY)
    left = (1 - _SPARE) * left - share * of_held
    searched = growth * share * np.cumsum(most.sum(1), 0)
    waiting = share * (most.mean(1).sum(0) - np.cumsum(most.mean(1), 0))
    fits = (searched + waiting <= left).all(1) | (searched <= _SEARCH_SHARE * left).all(1)
    size = max(len(probes), int(np.flatnonzero(fits).max(initial=-1)) + 1)
    chosen = {id(each) for each in order[:size]}
    return SearchExamples(
        train=[each for each in train if id(each) in chosen],
        validation=[each for each in validation if id(each) in chosen],
        rest=order[size:],
    )


def ask_rest(
    table: AnswerTable,
    prompts: Sequence[str],
    chosen: str,
    held: Sequence[FitExample],
    rest: Sequence[FitExample],
) -> None:
    """Ask what waited for the prompt that is chosen, as far as the budget reaches; what a certificate needs goes first.

    Raises:
        WireError: see `CloudGate.ask`.
    """
    if not rest:
        return
    try:
        table.fill(prompts, held)
        for begin in range(0, len(rest), _NUM_AT_ONCE):
            part = rest[begin : begin + _NUM_AT_ONCE]
            try:
                table.fill([chosen], part)
            except BudgetError:
                # What came before there was no room is kept on disk, but the table has all of a part or none.
                for each in part:
                    table.fill([chosen], [each])
    except BudgetError:
        pass


def in_turn(train: Sequence[FitExample], validation: Sequence[FitExample]) -> list[FitExample]:
    """Both in one order: what a search cannot do without, then each in proportion to its number."""
    parts = [place / len(part) for part in (train, validation) for place in range(len(part))]
    for place in (*range(min(_MIN_TRAIN, len(train))), len(train)):
        parts[place] = -1.0
    both = [*train, *validation]
    return [both[place] for place in np.argsort(parts, kind="stable")]


def _most(table: AnswerTable, gate: CloudGate, prompt: str, example: FitExample) -> Amounts:
    return _amounts(sum((gate.most(each) for each in table.requests(prompt, example)), Cost()))


def _amounts(cost: Cost) -> Amounts:
    return np.array([cost.calls, cost.tokens, cost.usd], np.float64)

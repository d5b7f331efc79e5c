"""Does what was tuned for one cloud model serve another one?

Prompt and adapter are tuned with the first cloud. On each other cloud three things are judged: both as they are; both,
with the prompt chosen anew for a tenth of the tokens; and both tuned there, for all of the tokens.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from typing import Any

from cells import OutOfTimeError, Value
from page import Page
from result_folder import grid
from sandwich_arms import Sandwich, best_prompt, fitted, sandwich_pipeline
from sandwich_bench import Bench, Learnt, judge
from study_options import at_least_one, plain_endings, results_of
from zocp_study import (
    EXPECTED,
    Study,
    Where,
    about_study,
    column,
    difference,
    finished,
    make_parser,
    opened_cloud,
    opened_study,
    opened_where,
    score_of,
)

from cotune.errors import BudgetError
from cotune.evaluation.markup import Html
from cotune.evaluation.report import Section
from cotune.sandwich.budget import Budget

NAME = "zocp_transfer"
SHARE = 0.1
FROZEN, ANEW, THERE = "as it is", "prompt anew, 10 % of the tokens", "tuned there"


def parser() -> argparse.ArgumentParser:
    """Of this command."""
    made = make_parser(
        NAME,
        __doc__,
        "  python reproduce/zocp_transfer.py --tasks nlu --cloud-model starter --others ./stories260K\n"
        "  python reproduce/zocp_transfer.py --data-root data --cloud https://host/v1 --cloud-model a --others b c\n",
    )
    made.add_argument("--budget-tokens", type=at_least_one, default=20_000, help="of the cloud (default: %(default)s)")
    made.add_argument(
        "--others", nargs="+", required=True, help="other models of the same API; without --cloud, to be hosted here"
    )
    return made


def moved(bench: Bench, *, learn: Bench) -> dict[str, Value]:
    """Tune with one cloud once, judge with another: as it is, and with the prompt chosen anew.

    Args:
        bench: with the other cloud.
        learn: with the first one; the edge is the same.

    Returns:
        What `judge` gives, or `refused`, by how it was moved.
    """
    learnt = fitted(learn, "cut")
    server = learnt.server
    assert isinstance(server, Sandwich)
    found = {FROZEN: judge(bench, learnt)}
    gate = bench.gate(Budget(tokens=int(SHARE * (bench.budget.tokens or 0))))
    pipeline = sandwich_pipeline(bench, gate, server.x, half=server.half, mode=server.mode)
    try:
        prompt, _, seen = best_prompt(bench, pipeline, bench.prepared(pipeline, "train", "validation"))
    except BudgetError as error:
        return {**found, ANEW: {"refused": str(error)}}
    anew = Learnt(
        server=replace(server, prompt=prompt),
        taken=gate.account.taken(),
        sent=[*learnt.sent, *gate.sent.payloads],
        notes={"prompt": prompt, "examples": seen},
    )
    return {**found, ANEW: judge(bench, anew)}


class Transfer:
    """The cells of this study."""

    def __init__(self, study: Study, others: Sequence[Where]) -> None:
        self.study, self.others = study, others

    def run(self, task: str, other: Where, how: str, seed: int) -> Value:
        """One way to serve another cloud."""
        study, tokens = self.study, self.study.args.budget_tokens
        if how == THERE:
            arm = partial(fitted, constraint="cut")
            return study.run(task, "H cuts", arm, seed, tokens, where=other)

        def work(bench: Bench) -> Value:
            with opened_cloud(study.where.url, study.args.key_env) as first:
                try:
                    return {"ways": moved(bench, learn=replace(bench, cloud=first, model=study.where.model))}
                except BudgetError as error:
                    return {"ways": {way: {"refused": str(error)} for way in (FROZEN, ANEW)}}

        # One cell for both, so that the first cloud is paid once.
        value = study.cell(task, seed, tokens, {"arm": "transfer", "from": study.where.model}, work, where=other)
        return dict(value["ways"][how])


def build(transfer: Transfer) -> Page:
    """Measure what is missing and show what there is."""
    study, sections, lines, unfinished = transfer.study, [], list[str](), list[str]()
    measured: dict[str, Any] = {}
    for task in study.args.tasks:
        rows: dict[str, dict[str, Any]] = {}
        for other in transfer.others:
            runs: dict[str, list[Value]] = {}
            for how in (FROZEN, ANEW, THERE):
                try:
                    runs[how] = [transfer.run(task, other, how, seed) for seed in study.seeds]
                except OutOfTimeError:
                    unfinished.append(f"{how} on {other.model}, {task}")
            for how, each in runs.items():
                if finished(each):
                    there = runs.get(THERE, [])
                    rows[f"{other.model}, {how}"] = {
                        "score": score_of(each),
                        "less tuned there": difference(each, there) if finished(there) and how != THERE else None,
                        "tokens": column(each, "train", "tokens_in") + column(each, "train", "tokens_out"),
                        "prompts": [run["notes"].get("prompt") for run in each],
                    }
                else:
                    lines += [f"{task} {other.model}, {how}: {run['refused']}" for run in each if "refused" in run]
        columns = {
            "score": [str(row["score"]) for row in rows.values()],
            "less tuned there": [str(row["less tuned there"] or "") for row in rows.values()],
            "tokens to learn": [f"{row['tokens']:,.0f}" for row in rows.values()],
        }
        table = grid(f"{task}: tuned with {study.where.model}, judged with others", "cloud", list(rows), columns)
        sections.append(Section(name=task, short=task, heading=task, content=Html(table)))
        measured[task] = rows
        lines += [f"{task} {name}: {row['score']!s}" for name, row in rows.items()]
    return Page(
        title="From one cloud model to others",
        lead=f"Prompt and adapter tuned with {study.where.model}.",
        expected=EXPECTED,
        measured=measured,
        sections=sections,
        deviations=[
            "Tokens of 'as it is' are those of the tuning with the first cloud; nothing is learnt with the other.",
            "A tenth of the budget buys a choice among the same prompts, on fewer examples.",
        ],
        lines=lines,
        unfinished=unfinished,
    )


def main() -> None:
    """Entry point."""
    args = parser().parse_args()
    with plain_endings(), opened_study(args, NAME) as study, ExitStack() as stack:
        others = [stack.enter_context(opened_where(args, model)) for model in args.others]
        page = build(Transfer(study, others))
        page.publish(
            results_of(args, NAME),
            about=about_study(study),
            lead=f"Edge {study.model_name}.",
        )


if __name__ == "__main__":
    main()

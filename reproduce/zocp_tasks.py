"""Sandwiched tuning against its rivals: arms on four tasks, at equal cloud tokens and at equal inference cost.

Every arm gets the same tokens of the cloud to learn with, and one ledger counts calls, tokens, operations of the edge,
bytes, dollars and seconds alike. Beside the table: score against cost, latency with its break-even, what leaked, how
far joint and bilevel solutions are apart, and a verdict for each goal.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from cells import OutOfTimeError, Value
from dspy_arms import DSPY_ARMS, has_dspy
from mean import Mean
from page import Page
from result_folder import Point, grid, plot_lines
from sandwich_arms import ARMS, LEARNING, SANDWICH
from study_options import at_least_one, plain_endings, results_of
from zocp_study import EXPECTED, Study, about_study, column, difference, finished, make_parser, opened_study, score_of

from cotune.evaluation.markup import Html, bullets
from cotune.evaluation.report import Section

NAME = "zocp_tasks"
LINES_IN_A_PLOT = 7
_NOT_COUNTED = "not counted"
ALL_ARMS = {**ARMS, **DSPY_ARMS}
LEARNERS = (*LEARNING, *DSPY_ARMS)
Runs = dict[str, list[Value]]


def parser() -> argparse.ArgumentParser:
    """Of this command."""
    made = make_parser(
        NAME,
        __doc__,
        "  python reproduce/zocp_tasks.py --num-test 12 --seeds 1 --budget-tokens 4000     # texts that cotune makes\n"
        "  python reproduce/zocp_tasks.py --data-root data --model ./edge-1b --cloud https://host/v1 --cloud-model m\n",
    )
    made.add_argument(
        "--arms",
        nargs="+",
        choices=ALL_ARMS,
        default=[name for name in ALL_ARMS if name in ARMS or has_dspy()],
        help="(default: all; those of DSPy where it is installed)",
    )
    made.add_argument(
        "--budget-tokens",
        nargs="+",
        type=at_least_one,
        default=[5_000, 20_000],
        help="of the cloud, in and out, to learn with; the largest is that of the table (default: %(default)s)",
    )
    made.add_argument(
        "--samples", nargs="+", type=at_least_one, default=[2, 5], help="more settings of I (default: %(default)s)"
    )
    made.add_argument(
        "--shots", nargs="+", type=at_least_one, default=[1, 4], help="more settings of icl (default: %(default)s)"
    )
    made.add_argument(
        "--split-width", type=at_least_one, default=4096, help="of the cut layer that split learning would send"
    )
    return made


def measure(study: Study, task: str, tokens: int) -> tuple[Runs, list[str]]:
    """All arms with one budget, and those that the time left out."""
    found, unfinished = dict[str, list[Value]](), []
    # The sandwich first, since others learn with as many operations.
    for name in sorted(study.args.arms, key=lambda each: each != SANDWICH):
        budget = tokens if name in LEARNERS or name == "K routed" else max(study.args.budget_tokens)
        try:
            found[name] = [study.run(task, name, ALL_ARMS[name], seed, budget) for seed in study.seeds]
        except OutOfTimeError:
            unfinished.append(f"{name} on {task} with {tokens:,} tokens")
    return {name: found[name] for name in study.args.arms if name in found}, unfinished


def measure_settings(study: Study, task: str) -> tuple[Runs, list[str]]:
    """Arms whose cost of an answer can be turned up, in their other settings."""
    course, found, unfinished = study.course, dict[str, list[Value]](), []
    settings = [(f"I consistent, {n}", "I consistent", replace(course, num_samples=n)) for n in study.args.samples]
    settings += [(f"icl, {n}", "icl", replace(course, num_demonstrations=n)) for n in study.args.shots]
    for label, name, changed in settings:
        if name not in study.args.arms:
            continue
        budget = max(study.args.budget_tokens)
        try:
            found[label] = [study.run(task, name, ARMS[name], seed, budget, course=changed) for seed in study.seeds]
        except OutOfTimeError:
            unfinished.append(f"{label} on {task}")
    return found, unfinished


def served_tokens(runs: Sequence[Value]) -> float:
    """Tokens of the cloud for one answer, in and out."""
    return column(runs, "serve", "tokens_in") + column(runs, "serve", "tokens_out")


def break_even(alone: Sequence[Value], ours: Sequence[Value]) -> str:
    """When ours is faster than the cloud alone, in words: measured here, and by the cloud's seconds for a token.

    T_ours - T_alone = T_edge - (out_alone - out_ours) tau, so that a slower cloud helps if ours has it write less.
    """
    p50, alone_p50 = column(ours, "latency_s", "p50"), column(alone, "latency_s", "p50")
    saved = column(alone, "serve", "tokens_out") - column(ours, "serve", "tokens_out")
    here = f"{1e3 * p50:.0f} ms against {1e3 * alone_p50:.0f} ms of the cloud alone"
    if p50 < alone_p50:
        return f"faster here: {here}"
    edge_s = sum(sum(run["stages_s"].get(stage, 0.0) for stage in ("rewrite", "merge", "edge")) for run in ours) / len(
        ours
    )
    if saved <= 0:
        less = f"{-saved:.1f} tokens less" if saved < 0 else "as many tokens"
        return f"never faster than the cloud alone, which writes {less} ({here})"
    return f"slower here: {here}; faster from {1e3 * edge_s / saved:.1f} ms for a token of the cloud on"


def bytes_against_split(runs: Sequence[Value], width: int) -> str:
    """Bytes of an answer, beside split learning's, which sends a vector for each token, and its slope back."""
    ours = column(runs, "serve", "bytes")
    theirs = 2 * 2 * width * served_tokens(runs)
    return (
        f"an answer takes {ours:,.0f} bytes; its tokens through a cut layer of width {width:,} in 16 bits, there and "
        f"back, {theirs:,.0f}, which is {theirs / max(ours, 1):,.0f} times as much, and a closed API has no cut layer"
    )


def verdicts(runs: Mapping[str, Sequence[Value]]) -> dict[str, Any]:
    """What the goals came to on one task; nothing holds where nobody can do it."""
    found: dict[str, Any] = {}
    ours = runs.get(SANDWICH, [])
    if not finished(ours):
        return found
    rivals = {name: score_of(each).mean for name, each in runs.items() if name != SANDWICH and finished(each)}
    rivals.pop("raw", None)  # sends everything, so it is no rival
    if rivals:
        best = max(rivals, key=lambda name: rivals[name])
        gap = difference(ours, runs[best])
        found["best rival"] = {"name": best, "difference": gap, "holds": gap.mean >= 0 and score_of(ours).mean > 0}
    for name, key in (("G penalty", "cuts less penalty"), ("D distilled", "sandwich less distillation")):
        if finished(runs.get(name, [])):
            gap = difference(ours, runs[name])
            tie = gap.low is not None and gap.high is not None and gap.low <= 0 <= gap.high
            found[key] = {"difference": gap, "holds": gap.mean >= 0, "is_tie": tie}
    if finished(runs.get("raw", [])):
        gap = difference(ours, runs["raw"])
        raw = score_of(runs["raw"]).mean
        found["utility against raw"] = {"difference": gap, "holds": gap.mean >= -0.02 * raw and raw > 0}
    if ours[0]["leaks"]["units"]:
        for key, name in (
            ("no unit leaks", "leak_rate"),
            ("no unit leaks beside what is public", "leak_rate_own"),
            ("no unit leaks as words", "leak_words"),
        ):
            rate = column(ours, "leaks", name)
            found[key] = {"leak_rate": rate, "units": ours[0]["leaks"]["units"], "holds": rate == 0}
    return found


def table_of(task: str, runs: Mapping[str, Sequence[Value]]) -> Html:
    """Scores and the ledger, arm by arm."""
    names = [name for name, each in runs.items() if finished(each)]
    ours = runs.get(SANDWICH, [])

    def against(name: str) -> str:
        return str(difference(ours, runs[name])) if finished(ours) and name != SANDWICH else ""

    def cell(name: str, *path: str, scale: float = 1.0, digits: int = 0) -> str:
        return f"{scale * column(runs[name], *path):,.{digits}f}"

    columns = {
        "score": [str(score_of(runs[name])) for name in names],
        "H less it": [against(name) for name in names],
        "tokens to learn": [
            f"{column(runs[n], 'train', 'tokens_in') + column(runs[n], 'train', 'tokens_out'):,.0f}" for n in names
        ],
        "calls to learn": [cell(name, "train", "calls") for name in names],
        "edge to learn, GFLOP": [cell(name, "train", "edge_flops", scale=1e-9, digits=1) for name in names],
        "$ to learn": [cell(name, "train", "usd", digits=4) for name in names],
        "s to learn": [cell(name, "train", "seconds", digits=1) for name in names],
    }
    serving = {
        "calls": [cell(name, "serve", "calls", digits=2) for name in names],
        "tokens": [f"{served_tokens(runs[name]):,.1f}" for name in names],
        "edge, GFLOP": [cell(name, "serve", "edge_flops", scale=1e-9, digits=2) for name in names],
        "bytes": [cell(name, "serve", "bytes") for name in names],
        "p50, ms": [cell(name, "latency_s", "p50", scale=1e3) for name in names],
        "p95, ms": [cell(name, "latency_s", "p95", scale=1e3) for name in names],
        "most memory, MB": [_memory(runs[name]) for name in names],
    }
    leaking = {
        "of units": [cell(name, "leaks", "units") for name in names],
        "leaks, %": [cell(name, "leaks", "leak_rate", scale=100, digits=2) for name in names],
        "of the user, %": [cell(name, "leaks", "leak_rate_own", scale=100, digits=2) for name in names],
        "as words, %": [cell(name, "leaks", "leak_words", scale=100, digits=2) for name in names],
        "any leak, %": [cell(name, "leaks", "any_leak", scale=100, digits=1) for name in names],
    }
    return Html(
        grid(f"{task}: score of 100, mean ± 95 %, and what learning took", "arm", names, columns)
        + grid(f"{task}: one answer", "arm", names, serving)
        + grid(f"{task}: leaks in all that was sent, learning included", "arm", names, leaking)
    )


def equal_inference(task: str, runs: Mapping[str, Sequence[Value]]) -> tuple[Html, dict[str, Any]]:
    """Who costs at most as many of the cloud's tokens for an answer as the sandwich, and what that buys."""
    ours = runs.get(SANDWICH, [])
    if not finished(ours):
        return Html(""), {}
    most = served_tokens(ours)
    rows = {
        name: {
            "tokens": served_tokens(each),
            "score": score_of(each),
            "is_within": served_tokens(each) <= most * (1 + 1e-9),
            "difference": difference(ours, each),
        }
        for name, each in runs.items()
        if finished(each) and name not in (SANDWICH, "raw")
    }
    columns = {
        "tokens for an answer": [f"{row['tokens']:,.1f}" for row in rows.values()],
        f"within the {most:,.1f} of H": ["yes" if row["is_within"] else "no" for row in rows.values()],
        "score": [str(row["score"]) for row in rows.values()],
        "H less it": [str(row["difference"]) for row in rows.values()],
    }
    return grid(f"{task}: at the sandwich's cost of an answer", "arm", list(rows), columns), rows


def bilevel_rows(runs: Mapping[str, Sequence[Value]]) -> dict[str, dict[str, Any]]:
    """How far the chosen prompt is from the best one for its adapter, under each constraint."""
    rows = {}
    for name in ("F joint", "G penalty", SANDWICH, "H grown"):
        each = runs.get(name, [])
        if finished(each):
            certificates = [run["notes"]["certificate"] for run in each]
            rows[name] = {
                "gap": Mean.of([run["notes"]["gap"] for run in each]),
                "coupling": column(each, "notes", "coupling"),
                "sequential": sum(run["notes"]["is_sequential"] for run in each),
                "bound": max((one["bound"] for one in certificates if one), default=None),
                "n": min((one["num_examples"] for one in certificates if one), default=None),
            }
    return rows


def growth_table(task: str, runs: Mapping[str, Sequence[Value]]) -> Html:
    """What became of the pool that grows, and of the rewriters that are tuned, over all seeds."""
    growths = [one for run in runs.get("H grown", []) if "notes" in run for one in run["notes"]["growths"]]
    rounds = [one for run in runs.get("J tuned", []) if "notes" in run for one in run["notes"]["rewriter"]["rounds"]]
    found = ""
    if growths:
        columns = {
            "times": [str(len(growths))],
            "prompts written": [str(sum(one["num_written"] for one in growths))],
            "joined": [str(sum(len(one["joined"]) for one in growths))],
            "left": [str(sum(len(one["left"]) for one in growths))],
            "ended by the budget": [str(sum(one["ended_by_budget"] for one in growths))],
        }
        found += grid(f"{task}: the pool that grows", "arm", ["H grown"], columns)
    if rounds:
        columns = {
            "requests": [str(sum(one["num_requests"] for one in rounds))],
            "rewrites asked": [str(sum(one["num_rewrites"] for one in rounds))],
            "thrown away for a leak": [str(sum(one["num_leaks"] for one in rounds))],
            "requests with a better one": [str(sum(one["num_accepted"] for one in rounds))],
            "loss as they are": [f"{sum(one['loss'] for one in rounds) / len(rounds):.3f}"],
            "of the best": [f"{sum(one['best_loss'] for one in rounds) / len(rounds):.3f}"],
        }
        found += grid(f"{task}: the rewriter that is tuned", "arm", ["J tuned"], columns)
    preferred = [run["notes"]["rewriter"]["preferences"] for run in runs.get("J preferred", []) if "notes" in run]
    judged = [one for one in preferred if one and one["after"]]
    if judged:
        count = sum(one["after"]["num_requests"] for one in judged)

        def looked(when: str) -> str:
            accepted = sum(one[when]["num_accepted"] for one in judged)
            return f"{accepted} of {count}, {sum(one[when]['loss'] for one in judged) / len(judged):.3f}"

        columns = {
            "pairs": [str(sum(one["num_pairs"] for one in judged))],
            "loss of pairs": [f"{sum(one['loss'] for one in judged) / len(judged):.3f}"],
            "better than the request, loss; before": [looked("before")],
            "after": [looked("after")],
            "kept": [f"{sum(one['is_kept'] for one in judged)} of {len(preferred)}"],
        }
        found += grid(f"{task}: the rewriter that learns from pairs", "arm", ["J preferred"], columns)
    return Html(found)


def curves(study: Study, task: str, by_budget: Mapping[int, Runs]) -> Html:
    """Score against the tokens that were really spent, as many plots as colours tell apart."""
    lines: dict[str, list[Point]] = {}
    for name in LEARNERS:
        points = []
        for runs in by_budget.values():
            each = runs.get(name, [])
            if finished(each):
                spent = column(each, "train", "tokens_in") + column(each, "train", "tokens_out")
                points.append(score_of(each).point(spent))
        if points:
            lines[name] = sorted(points)
    named = list(lines.items())
    parts = [dict(named[start : start + LINES_IN_A_PLOT]) for start in range(0, len(named), LINES_IN_A_PLOT)]
    return Html(
        "".join(
            plot_lines(
                f"curve_{task}_{number}",
                f"{task}: score against the cloud's tokens that were spent to learn.",
                part,
                x_label="tokens of the cloud, in and out",
                y_label="score",
            )
            for number, part in enumerate(parts)
        )
    )


def build(study: Study) -> Page:
    """Measure what is missing and show what there is."""
    budgets = sorted(study.args.budget_tokens)
    sections, lines, unfinished = [], list[str](), list[str]()
    measured: dict[str, Any] = {}
    for task in study.args.tasks:
        by_budget: dict[int, Runs] = {}
        for tokens in reversed(budgets):
            by_budget[tokens], missing = measure(study, task, tokens)
            unfinished += missing
        runs = by_budget[budgets[-1]]
        settings, missing = measure_settings(study, task)
        unfinished += missing
        found, bilevel = verdicts(runs), bilevel_rows(runs)
        parity, parity_rows = equal_inference(task, {**runs, **settings})
        said = verdict_lines(found)
        alone = runs.get("A zero_shot", [])
        latency = {
            name: break_even(alone, each)
            for name, each in runs.items()
            if finished(alone) and finished(each) and name not in ("A zero_shot", "raw")
        }
        refused = [f"{name}: {run['refused']}" for name, each in runs.items() for run in each if "refused" in run]
        names = list(bilevel)
        if finished(runs.get(SANDWICH, [])):
            said.append(bytes_against_split(runs[SANDWICH], study.args.split_width))
        content = (
            bullets(said or ["The sandwich is not finished here, so there is no verdict."])
            + table_of(task, runs)
            + parity
            + curves(study, task, by_budget)
            + grid(
                f"{task}: is the prompt the best for its adapter?",
                "constraint",
                names,
                {
                    "gap": [str(bilevel[name]["gap"]) for name in names],
                    "coupling": [f"{bilevel[name]['coupling']:.2g}" for name in names],
                    "chosen one after the other": [f"{bilevel[name]['sequential']:g}" for name in names],
                    "bound of the gap, 95 %": [_number(bilevel[name]["bound"]) for name in names],
                    "n": [_number(bilevel[name]["n"]) for name in names],
                },
            )
            + growth_table(task, runs)
            + grid(f"{task}: is it faster than the cloud alone?", "arm", list(latency), {"p50": list(latency.values())})
            + bullets(refused)
        )
        sections.append(Section(name=task, short=task, heading=task, content=Html(content)))
        measured[task] = {
            "arms": {name: _summary(each) for name, each in {**runs, **settings}.items() if finished(each)},
            "curve": {
                str(tokens): {name: score_of(each) for name, each in there.items() if finished(each)}
                for tokens, there in by_budget.items()
            },
            "verdicts": found,
            "bilevel": bilevel,
            "equal_inference": parity_rows,
            "latency": latency,
            "refused": refused,
        }
        lines += [f"{task} {name:14s} {score_of(each)!s}" for name, each in runs.items() if finished(each)]
        lines += [f"{task}: {line}" for line in said]
    held = sum(bool(one["verdicts"].get("best rival", {}).get("holds")) for one in measured.values())
    lead = (
        f"At equal cloud tokens the sandwich is at least as good as its best rival on {held} of {len(measured)} tasks."
    )
    return Page(
        title="Sandwiched tuning and its rivals",
        lead=lead,
        expected=EXPECTED,
        measured=measured,
        sections=sections,
        deviations=deviations_of(study),
        lines=[*lines, lead],
        unfinished=unfinished,
    )


def verdict_lines(found: Mapping[str, Any]) -> list[str]:
    """The goals in words."""
    lines = []
    for name, one in found.items():
        if "leak_rate" in one:
            lines.append(f"{name}: {100 * one['leak_rate']:.2f} % of {one['units']} units, {_held(one)}")
            continue
        about = f" ({one['name']})" if "name" in one else ""
        tie = ", cannot be told apart" if one.get("is_tie") else ""
        lines.append(f"{name}{about}: {one['difference']!s} points{tie}, {_held(one)}")
    return lines


def deviations_of(study: Study) -> list[str]:
    """Where this is another study than the paper's."""
    args = study.args
    return [
        "The paper's data, models and rates are not public; tasks, prompts and metrics are ours.",
        f"Cloud {args.cloud_model}, edge {study.model_name}; the paper had one unnamed cloud and an edge of two GPUs.",
        "Prompts are chosen from a pool of four for each task, which grows in H grown alone; J has no optimiser but "
        "that choice, and but for J tuned and J preferred an edge that was not tuned to rewrite.",
        "Memory is what an arm held at most beyond the loaded models, learning and answering, as the resident set of "
        "one process tells it: an upper bound, rough where models are small.",
        "Leaks of the user are those outside of the descriptions of tools, which are the cloud's own; as words, "
        "without pieces of longer words and values that only appear where spaces are left out.",
        "An arm may leave some of its tokens unspent: a request is only sent if the most it could cost fits.",
        "Arms without a cloud learn with as many operations of the edge as H, or more by at most a step.",
        "Latency is that of one request after the other, on this machine and to this cloud.",
        *(
            ["The user has own words, which requests and prompts do not tell: " + told + "."]
            if (told := ", ".join(f"{word} for {name} in {task}" for task, name, word in args.own_words))
            else []
        ),
        *(["Strict: words that few requests of the training part use are replaced too."] if args.strict else []),
        *(["Requests are made by cotune, far too easy to tell arms apart."] if args.data_root is None else []),
    ]


def _summary(runs: Sequence[Value]) -> dict[str, Any]:
    return {
        "score": score_of(runs),
        "train": {name: column(runs, "train", name) for name in runs[0]["train"]},
        "serve": {name: column(runs, "serve", name) for name in runs[0]["serve"]},
        "latency_s": {name: column(runs, "latency_s", name) for name in ("p50", "p95")},
        "leaks": {name: column(runs, "leaks", name) for name in runs[0]["leaks"]},
        "peak_memory_mb": None if _memory(runs) == _NOT_COUNTED else column(runs, "peak_memory_mb"),
        "prompts": [run["notes"].get("prompt") for run in runs],
    }


def _memory(runs: Sequence[Value]) -> str:
    if any(run["peak_memory_mb"] is None for run in runs):
        return _NOT_COUNTED
    return f"{column(runs, 'peak_memory_mb'):,.0f}"


def _held(one: Mapping[str, Any]) -> str:
    return "holds" if one["holds"] else "missed"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"


def main() -> None:
    """Entry point."""
    args = parser().parse_args()
    with plain_endings(), opened_study(args, NAME) as study:
        page = build(study)
        page.publish(
            results_of(args, NAME),
            about=about_study(study),
            lead=f"Edge {study.model_name}, cloud {args.cloud_model}.",
        )


if __name__ == "__main__":
    main()

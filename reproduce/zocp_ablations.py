"""Sandwiched tuning, one thing changed at a time: both epsilons, which halves of the edge work, serial or parallel.

    tolerance          how much worse than the best the prompt may be: 0 to 0.3
    smoothing radius   of differences along random directions, where the adapter learns without back-propagation
    halves             the edge before the cloud, behind it, both, or nowhere; serial or parallel; behind it without a
                       copy gate, so that it writes all of its answer itself

The two epsilons are two things: the radius must stand out of the noise, which is measured; the tolerance is a price.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
from cells import OutOfTimeError, Value
from mean import Mean
from page import Page
from result_folder import grid, plot_lines
from sandwich_arms import HALVES, fitted
from sandwich_bench import Arm, Bench
from study_options import at_least_one, plain_endings, positive, results_of
from zocp_study import EXPECTED, Study, about_study, column, finished, make_parser, opened_study, score_of

from cotune.evaluation.markup import Html
from cotune.evaluation.report import Section
from cotune.sandwich.bilevel.slopes import estimate_slope, least_radius
from cotune.sandwich.edge_adapter import DRAFT_TEMPLATE, MERGE_TEMPLATE
from cotune.sandwich.pipeline import Pipeline
from cotune.sandwich.text_problem import AnswerTable, Cell

NAME = "zocp_ablations"
MODES = ("serial", "parallel")
NO_COPY = "post without copy, serial"
NUM_REPEATS = 8
_NUM_CELLS = 4


def parser() -> argparse.ArgumentParser:
    """Of this command."""
    made = make_parser(
        NAME,
        __doc__,
        "  python reproduce/zocp_ablations.py --tasks nlu --num-test 12 --seeds 1      # texts that cotune makes\n"
        "  python reproduce/zocp_ablations.py --data-root data --what tolerance --tasks tools\n",
    )
    made.add_argument(
        "--what", nargs="+", choices=("tolerance", "radius", "halves"), default=["tolerance", "radius", "halves"]
    )
    made.add_argument("--budget-tokens", type=at_least_one, default=20_000, help="of the cloud (default: %(default)s)")
    made.add_argument(
        "--tolerances", nargs="+", type=_not_negative, default=[0.0, 0.005, 0.02, 0.05, 0.1, 0.3], help="epsilon"
    )
    made.add_argument(
        "--radii", nargs="+", type=positive, default=[1e-3, 1e-2, 1e-1, 1.0], help="mu, of the edge's numbers"
    )
    made.add_argument(
        "--directions", type=at_least_one, default=8, help="of one estimated slope (default: %(default)s)"
    )
    return made


def _not_negative(text: str) -> float:
    return 0.0 if text in ("0", "0.0") else positive(text)


class Ablations:
    """The cells of this study on one task."""

    def __init__(self, study: Study, task: str) -> None:
        self.study, self.task = study, task
        self.tokens: int = study.args.budget_tokens
        self.unfinished: list[str] = []

    def runs(self, label: str, one: Callable[[int], Value]) -> list[Value]:
        """One for each seed; none where the time is over."""
        try:
            return [one(seed) for seed in self.study.seeds]
        except OutOfTimeError:
            self.unfinished.append(f"{label} on {self.task}")
            return []

    def tolerance(self) -> dict[float, list[Value]]:
        """The product's cuts under each tolerance."""
        arm, found = partial(fitted, constraint="cut"), dict[float, list[Value]]()
        for epsilon in self.study.args.tolerances:
            course = replace(self.study.course, tolerance=epsilon)

            def one(seed: int, course: Any = course) -> Value:
                return self.study.run(self.task, "H cuts", arm, seed, self.tokens, course=course)

            found[epsilon] = self.runs(f"tolerance {epsilon:g}", one)
        return {epsilon: each for epsilon, each in found.items() if finished(each)}

    def radius(self) -> dict[float, list[Value]]:
        """How well differences at each radius point along the exact slope of the edge's loss."""
        directions, found = self.study.args.directions, dict[float, list[Value]]()
        for mu in self.study.args.radii:
            key = {"what": "radius", "radius": mu, "directions": directions}

            def one(seed: int, mu: float = mu, key: Any = key) -> Value:
                work = partial(measure_radius, radius=mu, directions=directions)
                return self.study.cell(self.task, seed, self.tokens, key, work)

            found[mu] = self.runs(f"radius {mu:g}", one)
        return {mu: each for mu, each in found.items() if each}

    def halves(self) -> dict[str, list[Value]]:
        """The edge before, behind, both, nowhere; serial and parallel."""
        found = {}
        for mode in MODES:
            for half in HALVES:
                if mode == "parallel" and half in ("none", "pre"):
                    continue  # a draft that nobody merges
                arm: Arm = partial(fitted, constraint="cut", half=half, mode=mode, always_merges=True)
                template = DRAFT_TEMPLATE if mode == "parallel" else MERGE_TEMPLATE
                label = f"{half}, {mode}"

                def one(seed: int, arm: Arm = arm, label: str = label, template: str = template) -> Value:
                    return self.study.run(self.task, label, arm, seed, self.tokens, template=template)

                found[label] = self.runs(label, one)
        alone: Arm = partial(fitted, constraint="cut", half="post", always_merges=True)

        def uncopied(seed: int) -> Value:
            return self.study.run(self.task, "post, serial", alone, seed, self.tokens, copies=False)

        found[NO_COPY] = self.runs(NO_COPY, uncopied)
        for half in ("pre", "both"):
            tuned: Arm = partial(fitted, constraint="cut", half=half, is_tuned_before=True, always_merges=True)
            label = f"{half} tuned, serial"

            def learnt(seed: int, arm: Arm = tuned, label: str = label) -> Value:
                return self.study.run(self.task, label, arm, seed, self.tokens)

            found[label] = self.runs(label, learnt)
        return {label: each for label, each in found.items() if finished(each)}


def measure_radius(bench: Bench, *, radius: float, directions: int) -> Value:
    """Slopes of the edge's loss on a few cells: exact by back-propagation, and from differences at this radius.

    Returns:
        `cosine` of the estimate and the slope, averaged over `NUM_REPEATS` draws; `sigma`, the spread of the loss
        between batches, as a fit sees it; `slope`, the length of the exact one; `least`, the smallest radius that the
        rule of thumb allows for that noise.
    """
    gate = bench.gate(bench.budget)
    pipeline: Pipeline = bench.pipeline(gate, prompt=bench.task.prompts[0])
    examples = bench.prepared(pipeline, "train")
    table = AnswerTable(pipeline)
    table.fill([bench.task.prompts[0]], examples)
    cells = [
        Cell(each, tuple(answer.text for answer in table.answers(bench.task.prompts[0], each))) for each in examples
    ]
    # Not where LoRA begins: there half of its numbers have no slope.
    x = bench.edge.start() + 0.01 * np.random.default_rng(bench.seed).normal(size=bench.edge.start().size)
    batch = cells[:_NUM_CELLS]
    weights = np.full(len(batch), 1 / len(batch))
    _, exact = bench.edge.gradient(x, batch, weights, 0)
    length = float(np.linalg.norm(exact))
    cosines, ratios = [], []
    for repeat in range(NUM_REPEATS):
        found = estimate_slope(
            lambda z: float(weights @ bench.edge.losses(z, batch)),
            x,
            smoothing_radius=radius,
            num_directions=directions,
            generator=np.random.default_rng((bench.seed, repeat)),
        )
        cosines.append(float(found @ exact) / max(1e-12, length * float(np.linalg.norm(found))))
        ratios.append(float(found @ exact) / max(1e-12, length**2))
    draws = np.random.default_rng(bench.seed)
    losses = bench.edge.losses(x, cells)
    seen = [float(losses[draws.choice(len(cells), len(batch))].mean()) for _ in range(NUM_REPEATS)]
    return {
        "cosine": float(np.mean(cosines)),
        "along": float(np.mean(ratios)),
        "sigma": float(np.std(seen, ddof=1)),
        "slope": length,
        "least": least_radius(np.array(seen), max(length, 1e-12)),
    }


def build(study: Study) -> Page:
    """Measure what is missing and show what there is."""
    sections, lines, unfinished = [], list[str](), list[str]()
    measured: dict[str, Any] = {}
    for task in study.args.tasks:
        ablations = Ablations(study, task)
        content, found = "", dict[str, Any]()
        for what in study.args.what:
            html, numbers, told = SHOWN[what](ablations)
            content += html
            found[what] = numbers
            lines += [f"{task} {line}" for line in told]
        sections.append(Section(name=task, short=task, heading=task, content=Html(content)))
        measured[task] = found
        unfinished += ablations.unfinished
    return Page(
        title="Sandwiched tuning, one thing changed at a time",
        lead="The tolerance is a price, the radius a measuring step; neither is the other.",
        expected=EXPECTED,
        measured=measured,
        sections=sections,
        deviations=[
            "The draft beside the cloud comes from the untrained model, and so does the edge before it where it is not "
            "called tuned: there it learns first, under the plain prompt, from rewrites that were answered better.",
            "Differences are those of the adapter's loss, exact for a batch; sigma is the spread of batches.",
        ],
        lines=lines,
        unfinished=unfinished,
    )


Shown = tuple[str, dict[str, Any], list[str]]


def show_tolerance(ablations: Ablations) -> Shown:
    """Score, gap and certificate by tolerance."""
    runs, task = ablations.tolerance(), ablations.task
    rows = {
        epsilon: {
            "score": score_of(each),
            "gap": Mean.of([run["notes"]["gap"] for run in each]),
            "bound": max((run["notes"]["certificate"] or {}).get("bound", 1.0) for run in each),
            "tokens": column(each, "train", "tokens_in") + column(each, "train", "tokens_out"),
        }
        for epsilon, each in runs.items()
    }
    if not rows:
        return "", {}, []
    labels = [f"{epsilon:g}" for epsilon in rows]
    plots = plot_lines(
        f"tolerance_{task}",
        f"{task}: score under each tolerance.",
        {"cuts": [row["score"].point(epsilon) for epsilon, row in rows.items()]},
        x_label="tolerance, in units of the loss",
        y_label="score",
    )
    columns = {
        "score": [str(row["score"]) for row in rows.values()],
        "gap": [str(row["gap"]) for row in rows.values()],
        "bound, 95 %": [f"{row['bound']:.3f}" for row in rows.values()],
        "tokens to learn": [f"{row['tokens']:,.0f}" for row in rows.values()],
    }
    told = [
        f"tolerance {label}: {row['score']!s}, gap {row['gap']!s}"
        for label, row in zip(labels, rows.values(), strict=True)
    ]
    return str(plots) + grid(f"{task}: the tolerance", "tolerance", labels, columns), {"rows": rows}, told


def show_radius(ablations: Ablations) -> Shown:
    """How well differences point, by radius."""
    runs, task = ablations.radius(), ablations.task
    rows = {
        mu: {name: Mean.of([run[name] for run in each]) for name in ("cosine", "along", "sigma", "least")}
        for mu, each in runs.items()
    }
    if not rows:
        return "", {}, []
    plots = plot_lines(
        f"radius_{task}",
        f"{task}: the estimate's length along the exact slope; 1 is right.",
        {"differences": [row["along"].point(mu) for mu, row in rows.items()]},
        x_label="smoothing radius, log scale",
        y_label="share of the slope",
        is_log_x=True,
    )
    labels = [f"{mu:g}" for mu in rows]
    columns = {
        "along the slope": [row["along"].worded(3) for row in rows.values()],
        "cosine": [row["cosine"].worded(3) for row in rows.values()],
        "sigma between batches": [row["sigma"].worded(4) for row in rows.values()],
        "least radius for it": [row["least"].worded(3) for row in rows.values()],
    }
    told = [
        f"radius {mu:g}: along {row['along'].worded(3)}, cosine {row['cosine'].worded(3)}" for mu, row in rows.items()
    ]
    return str(plots) + grid(f"{task}: the smoothing radius", "radius", labels, columns), {"rows": rows}, told


def show_halves(ablations: Ablations) -> Shown:
    """Score, time and cost by where the edge works."""
    runs, task = ablations.halves(), ablations.task
    if not runs:
        return "", {}, []
    columns = {
        "score": [str(score_of(each)) for each in runs.values()],
        "p50, ms": [f"{1e3 * column(each, 'latency_s', 'p50'):,.0f}" for each in runs.values()],
        "p95, ms": [f"{1e3 * column(each, 'latency_s', 'p95'):,.0f}" for each in runs.values()],
        "calls": [f"{column(each, 'serve', 'calls'):.2f}" for each in runs.values()],
        "edge, GFLOP": [f"{1e-9 * column(each, 'serve', 'edge_flops'):.2f}" for each in runs.values()],
    }
    numbers = {
        label: {"score": score_of(each), "p50_s": column(each, "latency_s", "p50")} for label, each in runs.items()
    }
    told = [f"{label:15s} {score_of(each)!s}" for label, each in runs.items()]
    return grid(f"{task}: where the edge works, for one answer", "edge", list(runs), columns), numbers, told


SHOWN: dict[str, Callable[[Ablations], Shown]] = {
    "tolerance": show_tolerance,
    "radius": show_radius,
    "halves": show_halves,
}


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

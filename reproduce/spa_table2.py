"""SPA, table 2: the four ways to combine the side network with the backbone, on four data sets.

Beside them what the paper leaves out of this table: the base model, LoRA and adapters in the cloud, side networks with
attention (the serial one starts from the backbone, as in Ladder Side-Tuning), and SPA's ladder as it was released. All
have at most as many parameters as the tap ladder.
"""

from __future__ import annotations

from typing import Any

from cells import OutOfTimeError
from mean import Mean
from page import Page
from result_folder import Point, grid, plot_groups
from spa_paper import TABLE_2, TABLE_2_REMARK
from spa_study import Row, Study, plugin_row, rows_of, run_study
from spa_training import Method

from cotune.evaluation.markup import Html
from cotune.evaluation.report import Section

ROWS = (
    Row(name="base", method=None),
    Row(name="lora", method=Method(family="lora")),
    Row(name="adapter", method=Method(family="adapter")),
    *(plugin_row(mode) for mode in ("integration", "spa", "separation", "ladder")),
    *(plugin_row(mode, f"{mode}, attention", side="attention") for mode in ("integration", "spa")),
    *(plugin_row(mode, f"{mode}, attention", side="attention", init="backbone") for mode in ("separation", "ladder")),
    *(plugin_row(mode, f"{mode}, as released", side="published") for mode in ("integration", "spa")),
    *(plugin_row(mode, f"{mode}, as released", side="published") for mode in ("separation", "ladder")),
)
NAMES = [row.name for row in ROWS]
# What is drawn; the rest is in the tables.
DRAWN = ("base", "lora", "adapter", "integration", "spa", "separation", "ladder")
SCORES = (
    "rouge_l",
    "token_f1",
    "exact_match",
    "nats_per_token",
    "consult_rate",
    "changed_rate",
    "num_parameters",
    "train_s",
    "features_s",
    "certificate_rate",
)

Found = dict[str, dict[str, dict[str, Mean]]]


def measure(study: Study) -> tuple[Found, list[str]]:
    """Means of scores by row and data set, row by row, and what the budget left out."""
    found: Found = {name: {} for name in NAMES}
    unfinished = []
    for row in ROWS:
        for dataset in study.args.datasets:
            try:
                found[row.name][dataset] = means(rows_of(study, dataset, row))
            except OutOfTimeError:
                unfinished.append(f"{row.name} on {dataset}")
    return found, unfinished


def means(runs: list[dict[str, Any]]) -> dict[str, Mean]:
    """Over seeds, of the scores that are there."""
    return {name: Mean.of([run[name] for run in runs]) for name in SCORES if runs[0].get(name) is not None}


def sections(study: Study, found: Found) -> list[Section]:
    """The page's tables and plot."""
    datasets = study.args.datasets
    rouge = {
        **column(found, datasets, "rouge_l"),
        **{
            f"{dataset}, paper": [f"{TABLE_2[name][dataset]:.2f}" if name in TABLE_2 else "" for name in NAMES]
            for dataset in datasets
            if dataset in TABLE_2["spa"]
        },
    }
    bars: dict[str, list[Point | None]] = {
        name: [found[name][dataset]["rouge_l"].point() if dataset in found[name] else None for dataset in datasets]
        for name in DRAWN
    }
    cost = {
        "trained parameters": [
            next((f"{one['num_parameters'].mean:,.0f}" for one in found[name].values() if "num_parameters" in one), "0")
            for name in NAMES
        ],
        **{f"{dataset}, training s": [seconds(found[name].get(dataset, {})) for name in NAMES] for dataset in datasets},
    }
    return [
        Section(
            name="quality",
            short="Quality",
            heading="Rouge-L by mode",
            content=Html(
                plot_groups("rouge", "Mean over seeds, whiskers are 95 % intervals.", datasets, bars, y_label="Rouge-L")
                + grid("Rouge-L of 100, mean and 95 % interval over seeds", "method", NAMES, rouge)
                + grid(
                    "Nats per held-out token, teacher-forced",
                    "method",
                    NAMES,
                    column(found, datasets, "nats_per_token"),
                )
            ),
        ),
        Section(
            name="trips",
            short="Trips",
            heading="How often the device is asked",
            content=Html(
                grid(
                    "Share of generated tokens for which the device was asked",
                    "method",
                    NAMES,
                    column(found, datasets, "consult_rate"),
                )
                + grid(
                    "Share of generated tokens that are another one than the base model's",
                    "method",
                    NAMES,
                    column(found, datasets, "changed_rate"),
                )
            ),
        ),
        Section(
            name="cost",
            short="Cost",
            heading="What training takes",
            content=grid("Training, features of the backbone included", "method", NAMES, cost),
        ),
    ]


def column(found: Found, datasets: list[str], score: str) -> dict[str, list[str]]:
    """A score by data set, in the order of the rows."""
    return {
        dataset: [str(found[name][dataset][score]) if score in found[name].get(dataset, {}) else "" for name in NAMES]
        for dataset in datasets
    }


def seconds(scores: dict[str, Mean]) -> str:
    """Of training and of making features, where they are not cached yet."""
    if "train_s" not in scores:
        return ""
    return f"{scores['train_s'].mean + scores['features_s'].mean:.0f}"


def build(study: Study) -> Page:
    """The whole table."""
    found, unfinished = measure(study)
    return Page(
        title="SPA, table 2: four modes",
        lead="Four ways to combine side network and backbone, beside the base model and LoRA in the cloud.",
        expected=TABLE_2,
        measured=found,
        sections=sections(study, found),
        deviations=(TABLE_2_REMARK,),
        lines=[
            f"{name:24s} " + "  ".join(f"{d} {one['rouge_l']!s}" for d, one in found[name].items()) for name in NAMES
        ],
        unfinished=unfinished,
    )


if __name__ == "__main__":
    run_study("spa_table2", __doc__ or "", build)

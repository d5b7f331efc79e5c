"""SPA, table 2: the four ways to combine the side network with the backbone, on four data sets.

Beside them the base model and LoRA in the cloud, which the paper leaves out of this table.
"""

from __future__ import annotations

from typing import Any

from result_folder import Point, grid, plot_groups
from spa_paper import TABLE_2, TABLE_2_REMARK
from spa_study import MODES, Mean, Method, Page, Study, mode_runs, run_study

from cotune.evaluation.markup import Html
from cotune.evaluation.report import Section

ROWS = ("base", "lora", *MODES)


def measure(study: Study) -> dict[str, dict[str, dict[str, Mean]]]:
    """Rouge-L, loss and consult rate by row and data set."""
    found: dict[str, dict[str, dict[str, Mean]]] = {row: {} for row in ROWS}
    for dataset in study.args.datasets:
        base = study.base(dataset)
        found["base"][dataset] = _means([base])
        lora = study.runs(dataset, Method(family="lora"))
        found["lora"][dataset] = _means([{**run, **run["cloud"]} for run in lora])
        for mode in MODES:
            found[mode][dataset] = _means(mode_runs(study, dataset, mode))
    return found


def _means(runs: list[dict[str, Any]]) -> dict[str, Mean]:
    names = ("rouge_l", "nats_per_token", "consult_rate", "changed_rate", "num_parameters", "train_s")
    return {name: Mean.of([run[name] for run in runs]) for name in names if name in runs[0]}


def sections(study: Study, found: dict[str, dict[str, dict[str, Mean]]]) -> list[Section]:
    """The page's tables and plot."""
    datasets = study.args.datasets
    rouge = {
        **{dataset: [str(found[row][dataset]["rouge_l"]) for row in ROWS] for dataset in datasets},
        **{
            f"{dataset}, paper": [f"{TABLE_2[row][dataset]:.2f}" if row in TABLE_2 else "" for row in ROWS]
            for dataset in datasets
        },
    }
    asked = {
        dataset: [
            str(found[row][dataset]["consult_rate"]) if "consult_rate" in found[row][dataset] else "" for row in ROWS
        ]
        for dataset in datasets
    }
    nats = {dataset: [str(found[row][dataset]["nats_per_token"]) for row in ROWS] for dataset in datasets}
    bars: dict[str, list[Point | None]] = {row: [found[row][d]["rouge_l"].point() for d in datasets] for row in ROWS}
    return [
        Section(
            name="quality",
            short="Quality",
            heading="Rouge-L by mode",
            content=Html(
                plot_groups("rouge", "Mean over seeds, whiskers are 95 % intervals.", datasets, bars, y_label="Rouge-L")
                + grid("Rouge-L of 100, mean and 95 % interval over seeds", "method", ROWS, rouge)
                + grid("Nats per held-out token, teacher-forced", "method", ROWS, nats)
            ),
        ),
        Section(
            name="trips",
            short="Trips",
            heading="How often the device is asked",
            content=grid("Share of generated tokens for which the device was asked", "method", ROWS, asked),
        ),
    ]


def build(study: Study) -> Page:
    """The whole table."""
    found = measure(study)
    return Page(
        title="SPA, table 2: four modes",
        lead="Four ways to combine side network and backbone, beside the base model and LoRA in the cloud.",
        expected=TABLE_2,
        measured=found,
        sections=sections(study, found),
        deviations=(TABLE_2_REMARK,),
        lines=[
            f"{row:12s} " + "  ".join(f"{d} {found[row][d]['rouge_l']!s}" for d in study.args.datasets) for row in ROWS
        ],
    )


if __name__ == "__main__":
    run_study("spa_table2", __doc__ or "", build)

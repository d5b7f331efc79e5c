"""SPA, tables 3 and 5: quality and consult rate by the size of the training set.

The paper calls the sizes small, medium and full and does not say what they are; here they are an eighth, a half and
all of the training texts.
"""

from __future__ import annotations

from mean import Mean
from page import Page
from result_folder import grid, plot_lines
from spa_paper import TABLE_3, TABLE_5
from spa_study import Study, plugin_row, rows_of, run_study

from cotune.evaluation.markup import Html
from cotune.evaluation.report import Section

SHARES = {"small": 1 / 8, "medium": 1 / 2, "full": 1.0}


def build(study: Study) -> Page:
    """Both tables, from the same runs."""
    sizes = {name: max(16, round(share * study.args.num_train)) for name, share in SHARES.items()}
    rouge: dict[str, dict[str, Mean]] = {name: {} for name in sizes}
    asked: dict[str, dict[str, Mean]] = {name: {} for name in sizes}
    for dataset in study.args.datasets:
        for name, size in sizes.items():
            runs = rows_of(study, dataset, plugin_row("spa"), size)
            rouge[name][dataset] = Mean.of([run["rouge_l"] for run in runs])
            asked[name][dataset] = Mean.of([run["consult_rate"] for run in runs])
    datasets, rows = study.args.datasets, [f"{name}, {size} texts" for name, size in sizes.items()]
    lines = {d: [rouge[name][d].point(size) for name, size in sizes.items()] for d in datasets}
    trips = {d: [asked[name][d].point(size) for name, size in sizes.items()] for d in datasets}
    columns = {
        **{d: [str(rouge[name][d]) for name in sizes] for d in datasets},
        **{f"{d}, paper": [f"{TABLE_3[name][d]:.1f}" for name in sizes] for d in datasets if d in TABLE_3["full"]},
    }
    rates = {
        **{d: [str(asked[name][d]) for name in sizes] for d in datasets},
        "paper": [f"{TABLE_5[name]:.3f}" for name in sizes],
    }
    x_label = "training texts, log scale"
    return Page(
        title="SPA, tables 3 and 5: size of the training set",
        lead="Mode spa, trained on an eighth, a half and all of the texts.",
        expected={"table_3": TABLE_3, "table_5": TABLE_5},
        measured={"sizes": sizes, "rouge_l": rouge, "consult_rate": asked},
        sections=[
            Section(
                name="quality",
                short="Quality",
                heading="Table 3: Rouge-L by size",
                content=Html(
                    plot_lines(
                        "rouge",
                        "Mean over seeds, with 95 % intervals.",
                        lines,
                        x_label=x_label,
                        y_label="Rouge-L",
                        is_log_x=True,
                    )
                    + grid("Rouge-L of 100", "training set", rows, columns)
                ),
            ),
            Section(
                name="trips",
                short="Trips",
                heading="Table 5: how often the device is asked",
                content=Html(
                    plot_lines(
                        "asked",
                        "Share of generated tokens.",
                        trips,
                        x_label=x_label,
                        y_label="consult rate",
                        is_log_x=True,
                    )
                    + grid("Share of generated tokens for which the device was asked", "training set", rows, rates)
                ),
            ),
        ],
        lines=[
            f"{row:20s} " + "  ".join(f"{d} {rouge[name][d]!s}, asked {asked[name][d]!s}" for d in datasets)
            for name, row in zip(sizes, rows, strict=True)
        ],
    )


if __name__ == "__main__":
    run_study("spa_table3", __doc__ or "", build)

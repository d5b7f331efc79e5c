"""What a side network needs: how many taps, how wide it is, how fine its taps are, whose down-projections they pass.

Mode integration, so that no gate plays a part. The number of parameters is what each choice makes it.
"""

from __future__ import annotations

from collections.abc import Mapping

from cells import OutOfTimeError
from mean import Mean
from page import Page
from result_folder import Point, grid, plot_groups
from spa_study import Row, Study, plugin_row, rows_of, run_study

from cotune.evaluation.markup import Html
from cotune.evaluation.report import Section
from cotune.wire.codec import Int4Codec, Int8Codec

TAPS = (8, 1)
WIDTHS = (16, 32, 64, 128)
SCORES = ("rouge_l", "nats_per_token", "num_parameters")


def groups(study: Study) -> dict[str, dict[str, Row]]:
    """By what is changed: each choice and its row; the study's own settings are one of each."""
    own = plugin_row("integration")
    num_taps = study.backbone.projections.num_taps
    return {
        "taps": {
            f"all ({num_taps})": own,
            **{str(num): plugin_row("integration", taps=num) for num in TAPS if num < num_taps},
        },
        "width": {
            str(width): own if width == study.args.side_width else plugin_row("integration", width=width)
            for width in WIDTHS
        },
        "bits of a tap": {"8": own, "4": plugin_row("integration", bits=4)},
        "down-projections": {
            "shared, in the cloud": own,
            "personal, on the device": plugin_row("integration", down="personal"),
        },
    }


def bytes_per_token(study: Study, row: Row) -> int:
    """Of all taps of a position on the wire; headers and logits come on top."""
    assert row.method is not None
    projections = study.cloud(row.method).projections
    codec = Int4Codec() if row.method.bits == 4 else Int8Codec()
    return codec.num_bytes(projections.num_taps, projections.tap_dim)


def scores_of(study: Study, rows: Mapping[str, Row]) -> dict[str, dict[str, dict[str, Mean]]]:
    """By choice and data set, over seeds.

    Raises:
        OutOfTimeError: a cell is missing, and the budget is spent.
    """
    found: dict[str, dict[str, dict[str, Mean]]] = {choice: {} for choice in rows}
    for dataset in study.args.datasets:
        for choice, row in rows.items():
            runs = rows_of(study, dataset, row)
            found[choice][dataset] = {score: Mean.of([run[score] for run in runs]) for score in SCORES}
    return found


def build(study: Study) -> Page:
    """A table and a plot for each thing that is changed."""
    datasets = study.args.datasets
    measured: dict[str, dict[str, dict[str, dict[str, Mean]]]] = {}
    sections, lines, unfinished = [], [], []
    for name, rows in groups(study).items():
        try:
            found = measured[name] = scores_of(study, rows)
        except OutOfTimeError:
            unfinished.append(f"the effect of {name}")
            continue
        choices = list(rows)
        columns = {
            "parameters": [f"{found[choice][datasets[0]]['num_parameters'].mean:,.0f}" for choice in choices],
            "bytes of taps": [f"{bytes_per_token(study, row):,}" for row in rows.values()],
            **{
                f"{dataset}, {words}": [str(found[choice][dataset][score]) for choice in choices]
                for dataset in datasets
                for score, words in (("nats_per_token", "nats"), ("rouge_l", "Rouge-L"))
            },
        }
        bars: dict[str, list[Point | None]] = {
            choice: [found[choice][dataset]["nats_per_token"].point() for dataset in datasets] for choice in choices
        }
        key = name.replace(" ", "-")
        sections.append(
            Section(
                name=key,
                short=name,
                heading=f"Effect of {name}",
                content=Html(
                    plot_groups(key, "Mean over seeds, with 95 % intervals.", datasets, bars, y_label="nats per token")
                    + grid("Mean and 95 % interval over seeds", name, choices, columns)
                ),
            )
        )
        lines += [
            f"{name}, {choice}: " + "  ".join(f"{d} {found[choice][d]['nats_per_token']!s} nats" for d in datasets)
            for choice in choices
        ]
    return Page(
        title="SPA: taps, width, bits and down-projections",
        lead="One setting at a time.",
        expected={"text": "the paper does not vary these; Ladder Side-Tuning's T5-3B reads one layer of 24"},
        measured=measured,
        sections=sections,
        deviations=(
            "Taps in 4 bits are rounded a second time from the same states; a served cloud sends 8 bits.",
            "Personal down-projections read whole normalised states, which a served cloud would have to send.",
        ),
        lines=lines,
        unfinished=unfinished,
    )


if __name__ == "__main__":
    run_study("spa_ablations", __doc__ or "", build)

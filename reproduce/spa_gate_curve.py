"""Quality against M: what a gate's threshold trades, teacher-forced on held-out texts.

M = 0 is the base model, M = 1 Fully Integration; the paper gives one point of this curve, M = 0.62.
"""

from __future__ import annotations

from itertools import pairwise

from page import Page
from result_folder import Point, plot_lines
from spa_study import Study, plugin_row, rows_of, run_study

from cotune.evaluation.report import Section

_MARKS = (0.0, 0.1, 0.25, 0.5, 0.62, 1.0)


def at(curve: list[list[float]], m: float) -> float:
    """Nats at M, between the curve's points on a straight line.

    Example:
        >>> at([[0.0, 4.0], [0.5, 3.0], [1.0, 2.8]], 0.25)
        3.5
    """
    for (m0, y0), (m1, y1) in pairwise(curve):
        if m0 <= m <= m1:
            return y0 + (y1 - y0) * (m - m0) / max(m1 - m0, 1e-12)
    return curve[-1][1]


def build(study: Study) -> Page:
    """The curve of the first seed's gate for each data set, and marks on it."""
    lines: dict[str, list[Point]] = {}
    measured = {}
    for dataset in study.args.datasets:
        runs = rows_of(study, dataset, plugin_row("spa"))
        lines[dataset] = [(m, nats, None, None) for m, nats in runs[0]["gate_curve"]]
        measured[dataset] = {
            "curves": [run["gate_curve"] for run in runs],
            "nats_at": {str(m): [at(run["gate_curve"], m) for run in runs] for m in _MARKS},
        }
    plot = plot_lines(
        "curve", "The gate of the first seed.", lines, x_label="M, share of tokens that ask", y_label="nats per token"
    )
    return Page(
        title="SPA: quality against M",
        lead="What the gate's threshold trades.",
        expected={"m": 0.62},
        measured=measured,
        sections=[Section(name="curve", short="Curve", heading="Nats per token against M", content=plot)],
        lines=[
            f"{dataset}: " + "  ".join(f"M {m} {sum(values) / len(values):.3f}" for m, values in one["nats_at"].items())
            for dataset, one in measured.items()
        ],
    )


if __name__ == "__main__":
    run_study("spa_gate_curve", __doc__ or "", build)

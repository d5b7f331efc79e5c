"""SPA, table 4: how often the device's choice differs from the base model's, and how often the gate asks there.

The paper gives two rates of what is a table of two by two. Here is all of it, on the texts that people wrote
(teacher-forced) and on those that mode spa writes (free-running).
"""

from __future__ import annotations

from mean import Mean
from page import Page
from result_folder import grid
from spa_paper import TABLE_4, TABLE_4_REMARK
from spa_study import Study, plugin_row, rows_of, run_study

from cotune.evaluation.markup import Html
from cotune.evaluation.report import Section

CELLS = ("asks_and_differs", "asks_and_agrees", "passes_and_differs", "passes_and_agrees")
WAYS = ("teacher_forced", "free_running")
RATES = ("asks", "differs", "asks where they differ", "asks where they agree", "differs where it asks")


def rates(cells: dict[str, float]) -> dict[str, float]:
    """What follows from the four shares.

    Example:
        >>> rates(dict(zip(CELLS, (0.568, 0.052, 0.214, 0.166))))["asks where they differ"]  # doctest: +ELLIPSIS
        0.726...
    """
    asks = cells["asks_and_differs"] + cells["asks_and_agrees"]
    differs = cells["asks_and_differs"] + cells["passes_and_differs"]
    values = (
        asks,
        differs,
        cells["asks_and_differs"] / max(differs, 1e-12),
        cells["asks_and_agrees"] / max(1 - differs, 1e-12),
        cells["asks_and_differs"] / max(asks, 1e-12),
    )
    return dict(zip(RATES, values, strict=True))


def build(study: Study) -> Page:
    """The table for each data set and way of reading."""
    measured: dict[str, dict[str, dict[str, Mean]]] = {}
    for dataset in study.args.datasets:
        runs = rows_of(study, dataset, plugin_row("spa"))
        for way in WAYS:
            shares = {cell: Mean.of([run[way][cell] for run in runs]) for cell in CELLS}
            derived = {rate: Mean.of([rates(run[way])[rate] for run in runs]) for rate in RATES}
            measured.setdefault(dataset, {})[way] = {**shares, **derived}
    paper = {"asks": "0.62", "differs": "0.782", "asks_and_differs": "0.568", "asks where they differ": "0.726"}
    paper |= {"asks where they agree": "0.239", "differs where it asks": "0.916"}
    rows = [*CELLS, *RATES]
    sections = []
    for way in WAYS:
        words = way.replace("_", " ")
        columns = {dataset: [str(measured[dataset][way][row]) for row in rows] for dataset in measured}
        columns["paper"] = [paper.get(row, "") for row in rows]
        content = grid(f"Shares of tokens, {words}", "tokens where", [row.replace("_", " ") for row in rows], columns)
        sections.append(Section(name=way, short=words, heading=f"Two by two, {words}", content=Html(content)))
    return Page(
        title="SPA, table 4: who differs, and who is asked",
        lead="The gate's decisions beside the device's, as the whole table of two by two.",
        expected=TABLE_4,
        measured=measured,
        sections=sections,
        deviations=(TABLE_4_REMARK,),
        lines=[
            f"{dataset}, {way}: asks {ways[way]['asks']!s}, differs {ways[way]['differs']!s}, "
            f"both {ways[way]['asks_and_differs']!s}"
            for dataset, ways in measured.items()
            for way in WAYS
        ],
    )


if __name__ == "__main__":
    run_study("spa_table4", __doc__ or "", build)

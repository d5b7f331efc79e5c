"""SPA, figure 5: a generated text with every token marked by who decided it."""

from __future__ import annotations

from mean import Mean
from page import Page
from spa_study import Study, plugin_row, rows_of, run_study

from cotune.evaluation.coloured_text import coloured_tokens, legend
from cotune.evaluation.markup import Html, paragraph
from cotune.evaluation.report import Section


def build(study: Study) -> Page:
    """The first test text of each data set, with the first seed, and shares over all texts and seeds."""
    measured = {}
    sections = []
    for dataset in study.args.datasets:
        runs = rows_of(study, dataset, plugin_row("spa"))
        example = runs[0]["example"]
        asked = Mean.of([run["consult_rate"] for run in runs])
        changed = Mean.of([run["changed_rate"] for run in runs])
        measured[dataset] = {"consult_rate": asked, "changed_rate": changed, "example": example}
        words = f"Over all texts the device was asked for {asked} of the tokens and decided {changed}."
        content = Html(
            paragraph(f"… {example['prompt'][-200:]}")
            + coloured_tokens(example["pieces"], example["token_ids"], example["sources"], example["consulted"])
            + legend()
            + paragraph(words)
        )
        sections.append(Section(name=dataset, short=dataset, heading=f"Who decided, on {dataset}", content=content))
    return Page(
        title="SPA, figure 5: token sources",
        lead="Mode spa, token by token.",
        expected={"text": "the paper shows two texts and gives no numbers"},
        measured=measured,
        sections=sections,
        lines=[
            f"{dataset}: asked {one['consult_rate']!s}, decided {one['changed_rate']!s}"
            for dataset, one in measured.items()
        ],
    )


if __name__ == "__main__":
    run_study("spa_figure5", __doc__ or "", build)

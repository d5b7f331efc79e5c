"""SPA, figures 3 and 4: quality by epoch, the serial ladder (LST) against SPA's side network.

The curve is the loss on held-out training texts after every epoch, which all methods are judged by anyway.
"""

from __future__ import annotations

from result_folder import Point, plot_lines
from spa_study import Mean, Method, Page, Study, run_study

from cotune.evaluation.report import Section

LINES = {"serial": "serial ladder (LST)", "parallel": "beside the backbone (SPA)", "lora": "LoRA in the cloud"}


def build(study: Study) -> Page:
    """One plot for each data set."""
    measured: dict[str, dict[str, list[Mean]]] = {}
    sections = []
    for dataset in study.args.datasets:
        curves: dict[str, list[Point]] = {}
        for family, label in LINES.items():
            runs = study.runs(dataset, Method(family=family))
            epochs = min(len(run["epochs"]) for run in runs)
            losses = [Mean.of([run["epochs"][i][2] for run in runs]) for i in range(epochs)]
            measured.setdefault(dataset, {})[family] = losses
            curves[label] = [loss.point(float(i)) for i, loss in enumerate(losses)]
        plot = plot_lines(
            dataset, "Mean over seeds, with 95 % intervals.", curves, x_label="epoch", y_label="nats per token"
        )
        sections.append(Section(name=dataset, short=dataset, heading=f"Loss by epoch on {dataset}", content=plot))
    return Page(
        title="SPA, figures 3 and 4: quality by epoch",
        lead="Held-out loss after every epoch of training.",
        expected={"text": "the serial ladder stays behind from the first epoch on; no numbers are given"},
        measured=measured,
        sections=sections,
        deviations=("The paper plots Rouge-L; the loss of held-out texts is less noisy and needs no decoding.",),
        lines=[
            f"{dataset}, {LINES[family]}: {losses[0]!s} before, {min(loss.mean for loss in losses):.3f} at best"
            for dataset, families in measured.items()
            for family, losses in families.items()
        ],
    )


if __name__ == "__main__":
    run_study("spa_figures3_4", __doc__ or "", build)

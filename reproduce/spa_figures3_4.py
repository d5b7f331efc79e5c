"""SPA, figures 3 and 4: quality by epoch, the serial ladder (LST) against SPA's side network.

The curve is the loss on held-out training texts after every epoch, which all methods are judged by anyway.
"""

from __future__ import annotations

from cells import OutOfTimeError
from mean import Mean
from page import Page
from result_folder import Point, plot_lines
from spa_study import Study, run_study
from spa_training import Method

from cotune.evaluation.report import Section

LINES = {
    "serial ladder (LST)": Method(family="serial"),
    "serial, attention, from the backbone (LST)": Method(family="serial", side="attention", init="backbone"),
    "beside the backbone (SPA)": Method(family="parallel"),
    "LoRA in the cloud": Method(family="lora"),
}


def build(study: Study) -> Page:
    """One plot for each data set."""
    measured: dict[str, dict[str, list[Mean]]] = {}
    sections, unfinished = [], []
    for dataset in study.args.datasets:
        curves: dict[str, list[Point]] = {}
        for label, method in LINES.items():
            try:
                runs = study.runs(dataset, method)
            except OutOfTimeError:
                unfinished.append(f"{label} on {dataset}")
                continue
            epochs = min(len(run["epochs"]) for run in runs)
            losses = [Mean.of([run["epochs"][i][2] for run in runs]) for i in range(epochs)]
            measured.setdefault(dataset, {})[label] = losses
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
            f"{dataset}, {label}: {losses[0]!s} before, {min(loss.mean for loss in losses):.3f} at best"
            for dataset, curves in measured.items()
            for label, losses in curves.items()
        ],
        unfinished=unfinished,
    )


if __name__ == "__main__":
    run_study("spa_figures3_4", __doc__ or "", build)

"""How often the gate asks under beam search, with 1, 2 and 4 beams.

The paper searches with beams and gives M per token. All beams that ask at one step share a message, so what delays the
text is the share of steps at which at least one beam asks: 1 - (1 - p)^B if the gates of B beams were independent.
"""

from __future__ import annotations

from mean import Mean
from page import Page
from result_folder import grid, plot_lines
from spa_judging import beam_trips
from spa_study import Study, run_study
from spa_training import Method

from cotune.evaluation.markup import Html
from cotune.evaluation.report import Section

BEAMS = (1, 2, 4)
NUM_TEXTS = 24


def build(study: Study) -> Page:
    """M per step by number of beams and data set."""
    measured: dict[str, dict[int, dict[str, Mean]]] = {}
    for dataset in study.args.datasets:
        test = study.data(dataset)[1][:NUM_TEXTS]
        for num in BEAMS:
            runs = [
                study.measured(
                    dataset,
                    Method(family="parallel"),
                    seed,
                    {"what": "beams", "num_beams": num},
                    lambda plugin, test=test, num=num: beam_trips(
                        study.backbone, plugin, test, num, study.args.max_new_tokens, study.args.max_length
                    ),
                )
                for seed in range(study.args.seeds)
            ]
            names = ("m_per_step", "consult_rate", "independent")
            measured.setdefault(dataset, {})[num] = {name: Mean.of([run[name] for run in runs]) for name in names}
    lines = {
        f"{dataset}{suffix}": [found[num][name].point(num) for num in BEAMS]
        for dataset, found in measured.items()
        for name, suffix in (("m_per_step", ""), ("independent", ", if independent"))
    }
    columns = {
        f"{dataset}, {words}": [str(found[num][name]) for num in BEAMS]
        for dataset, found in measured.items()
        for name, words in (("m_per_step", "M per step"), ("independent", "if independent"), ("consult_rate", "p"))
    }
    return Page(
        title="SPA: trips under beam search",
        lead="With several beams, nearly every step asks somebody.",
        expected={"m_per_token": 0.62, "m_per_step_if_independent": {"1": 0.62, "2": 0.856, "4": 0.979}},
        measured=measured,
        sections=[
            Section(
                name="beams",
                short="Beams",
                heading="M per step by number of beams",
                content=Html(
                    plot_lines(
                        "beams", "Mean over seeds, with 95 % intervals.", lines, x_label="beams", y_label="M per step"
                    )
                    + grid("Share of steps that wait for the device", "beams", [str(num) for num in BEAMS], columns)
                ),
            )
        ],
        deviations=(f"The first {NUM_TEXTS} test texts.",),
        lines=[
            f"{dataset}, {num} beams: M per step {found[num]['m_per_step']!s}, "
            f"if independent {found[num]['independent']!s}"
            for dataset, found in measured.items()
            for num in BEAMS
        ],
    )


if __name__ == "__main__":
    run_study("spa_beams", __doc__ or "", build)

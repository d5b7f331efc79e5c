"""The sections of the report, one function each, in reading order. A section without data is None."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from cotune.evaluation import plots
from cotune.evaluation.coloured_text import coloured_text, decision_bar, legend
from cotune.evaluation.generation_metrics import GenerationMetrics
from cotune.evaluation.markup import Html, bullets, escape, facts, figure, fold, join, paragraph
from cotune.evaluation.report_schema import Example, GatePoint, ReportMetrics, SectionName, TrainingCurve
from cotune.evaluation.report_tables import (
    bytes_table,
    egress_table,
    gate_table,
    generation_facts,
    loss_table,
    quality_table,
    rate_table,
    speed_series,
    speed_table,
)
from cotune.evaluation.setup_content import SETUP_HEADING, setup_content

_GLOSSARY = (
    "M: blocking round trips per token. q: share of tokens where the personal and the base token differ. "
    "c: seconds per cloud step. R: round trip and device time."
)
MAX_GATE_ROWS = 12
"""Of the table beside the gate's plot; a threshold for each held-out token is a page of its own."""


def story_section(report: ReportMetrics) -> Html | None:
    """What happened: the steps taken, the two processes, the model and the persona."""
    steps, processes = report["summary"][1:], report.get("processes")
    named = [
        (name, text) for name, text in (("Model", report.get("model")), ("Persona", report.get("persona"))) if text
    ]
    if not (steps or processes or named):
        return None
    parts = [bullets(steps, css_class="steps", ordered=True)]
    if processes:
        parts.append(
            Html(
                '<div class="processes">'
                f"{_process('Cloud process', 'cloud', processes['cloud'])}"
                '<div class="link" aria-hidden="true"><span>features →</span><span>← answers</span></div>'
                f"{_process('Device process', 'device', processes['device'])}</div>"
            )
        )
    if named:
        parts.append(facts(named, "prose"))
    return join(parts)


def quality_section(report: ReportMetrics) -> Html | None:
    """Base, LoRA and plugin on the held-out texts: plots and a table."""
    rows = report.get("quality")
    if not rows:
        return None
    drawn = []
    if any(row.get("rouge_l") is not None for row in rows):
        drawn.append(figure(plots.plot_quality(rows), "Rouge-L against the held-out texts; whiskers: 95 % interval."))
    if any(row.get("perplexity") is not None for row in rows):
        drawn.append(figure(plots.plot_perplexity(rows), "Perplexity per token on the held-out texts."))
    return join([Html(f'<div class="grid">{join(drawn)}</div>'), quality_table(rows)])


def text_section(report: ReportMetrics) -> Html | None:
    """Each example: the prompt, the base text, and the personal text coloured by who decided."""
    examples = report.get("examples")
    if not examples:
        return None
    intro = paragraph("Point at a token, or tap it, to see who decided it.", "note")
    return join([legend(), intro, *(_example(example) for example in examples)])


def speed_section(report: ReportMetrics, generation: GenerationMetrics | None) -> Html | None:
    """Tokens per second by schedule and answer form against the round-trip time."""
    rows = report.get("speed")
    parts = []
    if rows:
        series = speed_series(rows)
        caption = "Tokens per second against the round-trip time of the network."
        if any(row.get("predicted_tokens_per_s") is not None for row in rows):
            caption += " Solid: measured. Dashed: what the measured c, M and R allow."
        parts.append(
            Html(
                f'<div class="grid">{figure(plots.plot_speed(series), caption)}'
                f"<div>{rate_table(series)}{paragraph(_GLOSSARY, 'note')}</div></div>"
            )
        )
        parts.append(fold("All measurements of speed", speed_table(rows)))
    if generation is not None:
        parts.append(fold("One generation in numbers", generation_facts(generation)))
    return join(parts) if parts else None


def gate_section(report: ReportMetrics) -> Html | None:
    """Quality against M, threshold by threshold."""
    points = report.get("gate_curve")
    if not points:
        return None
    caption = "What each blocking round trip buys: quality on the held-out texts against M."
    plot, few = figure(plots.plot_gate(points), caption), _few_thresholds(points)
    grid = Html(f'<div class="grid">{plot}<div>{gate_table(few)}</div></div>')
    return join([grid, fold("All thresholds", gate_table(points))]) if len(few) < len(points) else grid


def _few_thresholds(points: Sequence[GatePoint]) -> list[GatePoint]:
    """The chosen one, and others at about equal steps of M: as many rows as the plot beside them is high."""
    if len(points) <= MAX_GATE_ROWS:
        return list(points)
    trips = [point["M"] for point in points]
    wanted = np.linspace(min(trips), max(trips), MAX_GATE_ROWS - 1)
    nearest = {int(np.abs(np.subtract(trips, at)).argmin()) for at in wanted}
    return [point for index, point in enumerate(points) if index in nearest or point.get("chosen")]


def egress_section(report: ReportMetrics) -> Html | None:
    """What left the device, by kind, and what the cloud could therefore see."""
    egress, seen, unseen = report.get("egress"), report.get("cloud_sees"), report.get("cloud_does_not_see")
    if not (egress or seen or unseen):
        return None
    parts = []
    if egress:
        plot = figure(plots.plot_egress(egress), "From the egress ledger: everything that left the device, by kind.")
        parts.append(Html(f'<div class="grid">{plot}<div>{egress_table(egress)}</div></div>'))
    if per_token := bytes_table(report.get("speed") or []):
        parts.append(per_token)
    columns = [
        Html(f'<div class="{css_class}"><h3>{title}</h3>{bullets(sentences)}</div>')
        for css_class, title, sentences in (
            ("panel sees", "What the cloud sees", seen),
            ("panel hidden", "What it does not see", unseen),
        )
        if sentences
    ]
    if columns:
        parts.append(Html(f'<div class="grid">{join(columns)}</div>'))
    return join(parts)


def training_section(report: ReportMetrics) -> Html | None:
    """Loss while training; one plot for each unit of the steps."""
    curves = report.get("training")
    if not curves:
        return None
    by_unit: dict[str, list[TrainingCurve]] = {}
    for curve in curves:
        by_unit.setdefault(curve.get("unit") or "step", []).append(curve)
    drawn = [
        figure(
            plots.plot_training(f"training{index}", unit, group),
            f"Loss by {unit}. Solid: training. Dashed: held-out.",
        )
        for index, (unit, group) in enumerate(by_unit.items())
    ]
    return Html(f'<div class="grid">{join(drawn)}<div>{loss_table(curves)}</div></div>')


def setup_section(report: ReportMetrics) -> Html | None:
    """Configuration, seeds, versions, and how to repeat the run."""
    return setup_content(
        report.get("config"),
        repeat=report.get("repeat") or (),
        versions=report.get("versions"),
        seeds=report.get("seeds"),
    )


SECTIONS: dict[SectionName, tuple[str, str, Callable[[ReportMetrics, GenerationMetrics | None], Html | None]]] = {
    "story": ("Story", "What happened", lambda report, _: story_section(report)),
    "quality": ("Quality", "How good the text is", lambda report, _: quality_section(report)),
    "text": ("Text", "Who decided each token", lambda report, _: text_section(report)),
    "speed": ("Speed", "How fast it is", speed_section),
    "gate": ("Gate", "When to ask the device", lambda report, _: gate_section(report)),
    "egress": ("Privacy", "What left the device", lambda report, _: egress_section(report)),
    "training": ("Training", "How it learned", lambda report, _: training_section(report)),
    "setup": ("Set-up", SETUP_HEADING, lambda report, _: setup_section(report)),
}
"""Name in the navigation, heading and content of each section, in reading order."""


def _process(title: str, css_class: str, sentences: Sequence[str]) -> Html:
    return Html(f'<div class="panel process-{css_class}"><h3>{title}</h3>{bullets(sentences)}</div>')


def _example(example: Example) -> Html:
    generation = GenerationMetrics.from_dict(example["generation"])
    base, reference = example.get("base_text"), example.get("reference")
    columns = []
    if base is not None:
        columns.append(Html(f'<div class="panel"><h4>Base model</h4><p class="generated">{escape(base)}</p></div>'))
    columns.append(
        Html(
            f'<div class="panel personal"><h4>With the plugin ({escape(generation.mode)})</h4>'
            f"{coloured_text(generation)}{decision_bar(generation)}</div>"
        )
    )
    parts = [
        Html(f'<h3 class="prompt"><span class="tag">Prompt</span> <bdi>{escape(example["prompt"])}</bdi></h3>'),
        Html(f'<div class="grid">{join(columns)}</div>'),
    ]
    if reference is not None:
        parts.append(
            Html(f'<p class="reference"><span class="tag">Reference</span> <bdi>{escape(reference)}</bdi></p>')
        )
    parts.append(fold("This generation in numbers", generation_facts(generation)))
    return Html(f'<article class="example">{join(parts)}</article>')

"""The sections of the report, one function each, in reading order. A section without data is None."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from cotune.evaluation import plots
from cotune.evaluation.coloured_text import coloured_text, decision_bar, legend
from cotune.evaluation.generation_metrics import GenerationMetrics
from cotune.evaluation.markup import (
    Column,
    Html,
    bullets,
    count,
    escape,
    facts,
    figure,
    fold,
    join,
    number,
    paragraph,
    share,
    size,
    table,
)
from cotune.evaluation.report_schema import (
    Example,
    QualityRow,
    ReportMetrics,
    SectionName,
    SpeedRow,
    TrainingCurve,
)

_GLOSSARY = (
    "M: blocking round trips per token. q: share of tokens where the personal and the base token differ. "
    "c: seconds per cloud step. R: round trip and device time."
)


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
    return join([Html(f'<div class="grid">{join(drawn)}</div>'), _quality_table(rows)])


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
                f"<div>{_rate_table(series)}{paragraph(_GLOSSARY, 'note')}</div></div>"
            )
        )
        parts.append(fold("All measurements of speed", _speed_table(rows)))
    if generation is not None:
        parts.append(fold("One generation in numbers", generation_facts(generation)))
    return join(parts) if parts else None


def gate_section(report: ReportMetrics) -> Html | None:
    """Quality against M, threshold by threshold."""
    points = report.get("gate_curve")
    if not points:
        return None
    is_rouge = points[0].get("rouge_l") is not None
    ordered = sorted(points, key=lambda point: point["M"])
    quality = [point.get("rouge_l") if is_rouge else point.get("nats_per_token") for point in ordered]
    columns = [
        Column("Threshold", [_threshold(point["threshold"], bool(point.get("chosen"))) for point in ordered]),
        Column("M", [escape(number(point["M"])) for point in ordered]),
        Column("Rouge-L" if is_rouge else "Nats per token", [escape(number(value)) for value in quality]),
    ]
    caption = "What each blocking round trip buys: quality on the held-out texts against M."
    plot = figure(plots.plot_gate(points), caption)
    return Html(f'<div class="grid">{plot}<div>{table("Thresholds of the gate", columns)}</div></div>')


def egress_section(report: ReportMetrics) -> Html | None:
    """What left the device, by kind, and what the cloud could therefore see."""
    egress, seen, unseen = report.get("egress"), report.get("cloud_sees"), report.get("cloud_does_not_see")
    if not (egress or seen or unseen):
        return None
    parts = []
    if egress:
        plot = figure(plots.plot_egress(egress), "From the egress ledger: everything that left the device, by kind.")
        parts.append(Html(f'<div class="grid">{plot}<div>{_egress_table(egress)}</div></div>'))
    if per_token := _bytes_per_token(report.get("speed") or []):
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
    drawn = join(
        figure(
            plots.plot_training(f"training{index}", unit, group), f"Loss by {unit}. Solid: training. Dashed: held-out."
        )
        for index, (unit, group) in enumerate(by_unit.items())
    )
    return Html(f'<div class="grid">{drawn}</div>')


def setup_section(report: ReportMetrics) -> Html | None:
    """Configuration, seeds, versions, and how to repeat the run."""
    parts = []
    if repeat := report.get("repeat"):
        parts.append(Html(f'<h3>Repeat this run</h3><pre class="code">{escape(chr(10).join(repeat))}</pre>'))
    panels = [
        Html(f'<div class="panel"><h3>{title}</h3>{facts(_flat(values))}</div>')
        for title, values in (("Seeds", report.get("seeds")), ("Versions", report.get("versions")))
        if values
    ]
    if panels:
        parts.append(Html(f'<div class="grid">{join(panels)}</div>'))
    if config := report.get("config"):
        parts.append(fold("The whole configuration", facts(_flat(config))))
    return join(parts) if parts else None


def speed_series(rows: Sequence[SpeedRow]) -> dict[str, list[SpeedRow]]:
    """Rows grouped by mode, schedule and answer form, each ordered by round-trip time."""
    num_modes = len({row.get("mode") for row in rows})
    series: dict[str, list[SpeedRow]] = {}
    for row in sorted(rows, key=lambda row: row["rtt_ms"]):
        names = (row["schedule"], row.get("answer"), row.get("mode") if num_modes > 1 else None)
        series.setdefault(", ".join(name for name in names if name), []).append(row)
    return series


def generation_facts(generation: GenerationMetrics) -> Html:
    """The numbers of one generation."""
    return facts(
        [
            ("Mode, schedule, answer", f"{generation.mode}, {generation.schedule}, {generation.answer}"),
            ("Tokens", count(generation.num_tokens)),
            ("Tokens per second", number(generation.tokens_per_s)),
            ("M", number(generation.M)),
            ("Consulted", share(generation.consult_rate)),
            ("Disagreed (q)", share(generation.disagree_rate)),
            ("Down per token", size(generation.bytes_down_per_token)),
            ("Up per token", size(generation.bytes_up_per_token)),
            ("Cloud per token", f"{number(generation.cloud_ms_per_token)} ms"),
            ("Device per token", f"{number(generation.device_ms_per_token)} ms"),
            ("Stalled per token", f"{number(generation.stall_ms_per_token)} ms"),
            ("Wasted cloud steps", count(generation.wasted_cloud_steps)),
            ("Certificate misses", count(generation.certificate_misses)),
            ("Seed", str(generation.seed)),
        ]
    )


SECTIONS: dict[SectionName, tuple[str, str, Callable[[ReportMetrics, GenerationMetrics | None], Html | None]]] = {
    "story": ("Story", "What happened", lambda report, _: story_section(report)),
    "quality": ("Quality", "How good the text is", lambda report, _: quality_section(report)),
    "text": ("Text", "Who decided each token", lambda report, _: text_section(report)),
    "speed": ("Speed", "How fast it is", speed_section),
    "gate": ("Gate", "When to ask the device", lambda report, _: gate_section(report)),
    "egress": ("Privacy", "What left the device", lambda report, _: egress_section(report)),
    "training": ("Training", "How it learned", lambda report, _: training_section(report)),
    "setup": ("Set-up", "Set-up, and how to repeat it", lambda report, _: setup_section(report)),
}
"""Name in the navigation, heading and content of each section, in reading order."""


def _process(title: str, css_class: str, sentences: Sequence[str]) -> Html:
    return Html(f'<div class="panel process-{css_class}"><h3>{title}</h3>{bullets(sentences)}</div>')


def _quality_table(rows: Sequence[QualityRow]) -> Html:
    best_rouge = max((value for row in rows if (value := row.get("rouge_l")) is not None), default=None)
    best_perplexity = min((value for row in rows if (value := row.get("perplexity")) is not None), default=None)
    optional = [
        ("Rouge-L", "rouge_l", [_rouge_cell(row, best_rouge) for row in rows]),
        ("Perplexity", "perplexity", [_best(row.get("perplexity"), best_perplexity) for row in rows]),
        ("Exact match", "exact_match", [escape(number(row.get("exact_match"))) for row in rows]),
        ("Token F1", "token_f1", [escape(number(row.get("token_f1"))) for row in rows]),
        ("Bits per byte", "bits_per_byte", [escape(number(row.get("bits_per_byte"))) for row in rows]),
        (
            "Trained parameters",
            "trainable_parameters",
            [escape(count(row.get("trainable_parameters"))) for row in rows],
        ),
        ("M", "M", [escape(number(row.get("M"))) for row in rows]),
    ]
    columns = [Column("Model", [escape(plots.quality_label(row)) for row in rows], is_number=False)]
    columns += [Column(head, cells) for head, key, cells in optional if any(row.get(key) is not None for row in rows)]
    return table("Quality on held-out texts; the best of each column is bold", columns)


def _rouge_cell(row: QualityRow, best: float | None) -> Html:
    interval = row.get("rouge_l_interval")
    whisker = f" <small>[{number(interval[0])}, {number(interval[1])}]</small>" if interval is not None else ""
    return Html(f"{_best(row.get('rouge_l'), best)}{whisker}")


def _best(value: float | None, best: float | None) -> Html:
    shown = escape(number(value))
    return Html(f"<strong>{shown}</strong>") if value is not None and value == best else shown


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


def _rate_table(series: Mapping[str, Sequence[SpeedRow]]) -> Html:
    times = sorted({row["rtt_ms"] for rows in series.values() for row in rows})
    rates = [{row["rtt_ms"]: row["tokens_per_s"] for row in rows} for rows in series.values()]
    best = {rtt_ms: max(rate[rtt_ms] for rate in rates if rtt_ms in rate) for rtt_ms in times}
    columns = [Column("Schedule, answer", [escape(label) for label in series], is_number=False)]
    for rtt_ms in times:
        columns.append(Column(f"{rtt_ms:g} ms", [_best(rate.get(rtt_ms), best[rtt_ms]) for rate in rates]))
    return table("Tokens per second by round-trip time", columns)


def _speed_table(rows: Sequence[SpeedRow]) -> Html:
    optional: list[tuple[str, str, Callable[[Any], str]]] = [
        ("Mode", "mode", lambda value: value or number(None)),
        ("Answer", "answer", lambda value: value or number(None)),
        ("RTT, ms", "rtt_ms", lambda value: f"{value:g}"),
        ("Tokens/s", "tokens_per_s", number),
        ("Predicted", "predicted_tokens_per_s", number),
        ("M", "M", number),
        ("q", "disagree_rate", share),
        ("Stall, ms/token", "stall_ms_per_token", number),
        ("Down/token", "bytes_down_per_token", size),
        ("Up/token", "bytes_up_per_token", size),
        ("Wasted steps", "wasted_cloud_steps", count),
    ]
    columns = [Column("Schedule", [escape(row["schedule"]) for row in rows], is_number=False)]
    for head, key, words in optional:
        if any(row.get(key) is not None for row in rows):
            cells = [escape(words(row.get(key))) for row in rows]
            columns.append(Column(head, cells, is_number=key not in ("mode", "answer")))
    return table("Each measurement of speed", columns)


def _threshold(threshold: float, is_chosen: bool) -> Html:
    shown = escape(number(threshold))
    return Html(f'{shown} <span class="tag">chosen</span>') if is_chosen else shown


def _egress_table(egress: Mapping[str, Any]) -> Html:
    rows = list(egress.values())
    columns = [
        Column("Kind", [escape(kind) for kind in egress] + [Html("All")], is_number=False),
        Column("Times", [escape(count(row["count"])) for row in rows] + [escape(count(sum(r["count"] for r in rows)))]),
        Column("Bytes", [escape(count(row["bytes"])) for row in rows] + [escape(count(sum(r["bytes"] for r in rows)))]),
    ]
    if any(row.get("why") for row in rows):
        columns.append(Column("Why", [escape(row.get("why") or "") for row in rows] + [Html("")], is_number=False))
    return table("What left the device, by kind", columns)


def _bytes_per_token(rows: Sequence[SpeedRow]) -> Html | None:
    """Mean over the round-trip times of each way of generating, where measured."""
    lines = []
    for label, group in speed_series(rows).items():
        down = [value for row in group if (value := row.get("bytes_down_per_token")) is not None]
        up = [value for row in group if (value := row.get("bytes_up_per_token")) is not None]
        if down and up:
            lines.append((label, sum(down) / len(down), sum(up) / len(up)))
    if not lines:
        return None
    columns = [
        Column("Schedule, answer", [escape(label) for label, _, _ in lines], is_number=False),
        Column("Down (cloud to device)", [escape(size(down)) for _, down, _ in lines]),
        Column("Up (device to cloud)", [escape(size(up)) for _, _, up in lines]),
    ]
    return table("Bytes per generated token", columns)


def _flat(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Nested objects as dotted names."""
    pairs: list[tuple[str, str]] = []
    for name, value in values.items():
        if isinstance(value, Mapping) and value:
            pairs += _flat(value, f"{prefix}{name}.")
        else:
            pairs.append((f"{prefix}{name}", str(value)))
    return pairs

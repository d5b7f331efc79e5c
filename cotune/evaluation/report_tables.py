"""The tables of the report. A column that no row has a value for is left out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from cotune.evaluation.generation_metrics import GenerationMetrics
from cotune.evaluation.markup import Column, Html, count, escape, facts, number, share, size, table
from cotune.evaluation.plots import quality_label
from cotune.evaluation.report_schema import EgressRow, GatePoint, QualityRow, SpeedRow, TrainingCurve


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
            ("Mode", generation.mode),
            ("Schedule", generation.schedule),
            ("Answer form", generation.answer),
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


def quality_table(rows: Sequence[QualityRow]) -> Html:
    """Every model with every quality that any of them has."""
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
    columns = [Column("Model", [escape(quality_label(row)) for row in rows], is_number=False)]
    columns += [Column(head, cells) for head, key, cells in optional if any(row.get(key) is not None for row in rows)]
    return table("Quality on held-out texts; best Rouge-L and perplexity in bold", columns)


def rate_table(series: Mapping[str, Sequence[SpeedRow]]) -> Html:
    """Tokens per second: a row for each way of generating, a column for each round-trip time."""
    times = sorted({row["rtt_ms"] for rows in series.values() for row in rows})
    rates = [{row["rtt_ms"]: row["tokens_per_s"] for row in rows} for rows in series.values()]
    best = {rtt_ms: max(rate[rtt_ms] for rate in rates if rtt_ms in rate) for rtt_ms in times}
    columns = [Column("Schedule, answer", [escape(label) for label in series], is_number=False)]
    for rtt_ms in times:
        columns.append(Column(f"{rtt_ms:g} ms", [_best(rate.get(rtt_ms), best[rtt_ms]) for rate in rates]))
    return table("Tokens per second by round-trip time", columns)


def speed_table(rows: Sequence[SpeedRow]) -> Html:
    """Everything that was measured of the speed."""
    optional: list[tuple[str, str, Callable[[Any], str]]] = [
        ("Mode", "mode", lambda value: value or number(None)),
        ("Answer", "answer", lambda value: value or number(None)),
        ("RTT, ms", "rtt_ms", lambda value: f"{value:g}"),
        ("Tokens/s", "tokens_per_s", number),
        ("Predicted", "predicted_tokens_per_s", number),
        ("M", "M", number),
        ("q", "disagree_rate", share),
        ("Stall, ms", "stall_ms_per_token", number),
        ("Down", "bytes_down_per_token", size),
        ("Up", "bytes_up_per_token", size),
        ("Wasted", "wasted_cloud_steps", count),
    ]
    columns = [Column("Schedule", [escape(row["schedule"]) for row in rows], is_number=False)]
    for head, key, words in optional:
        if any(row.get(key) is not None for row in rows):
            cells = [escape(words(row.get(key))) for row in rows]
            columns.append(Column(head, cells, is_number=key not in ("mode", "answer")))
    return table("Stall, down and up are per token; wasted counts cloud steps", columns)


def egress_table(egress: Mapping[str, EgressRow]) -> Html:
    """What left the device by kind, and in all."""
    rows = list(egress.values())
    columns = [
        Column("Kind", [escape(kind) for kind in egress] + [Html("All")], is_number=False),
        Column("Times", [escape(count(row["count"])) for row in rows] + [escape(count(sum(r["count"] for r in rows)))]),
        Column("Bytes", [escape(count(row["bytes"])) for row in rows] + [escape(count(sum(r["bytes"] for r in rows)))]),
    ]
    if any(row.get("why") for row in rows):
        columns.append(Column("Why", [escape(row.get("why") or "") for row in rows] + [Html("")], is_number=False))
    return table("What left the device, by kind", columns)


def loss_table(curves: Sequence[TrainingCurve]) -> Html:
    """Where each training began and ended."""
    held_out = [[loss for _, loss in curve.get("held_out") or []] for curve in curves]
    columns = [
        Column("Training of", [escape(curve["name"]) for curve in curves], is_number=False),
        Column("First loss", [escape(number(curve["points"][0][1])) for curve in curves]),
        Column("Last loss", [escape(number(curve["points"][-1][1])) for curve in curves]),
    ]
    if any(held_out):
        cells = [escape(number(min(losses) if losses else None)) for losses in held_out]
        columns.append(Column("Best held-out", cells))
    return table("Loss in nats per token", columns)


def bytes_table(rows: Sequence[SpeedRow]) -> Html | None:
    """Bytes per token, the mean over the round-trip times of each way of generating, where measured."""
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
        Column("Down", [escape(size(down)) for _, down, _ in lines]),
        Column("Up", [escape(size(up)) for _, _, up in lines]),
    ]
    return table("Bytes per generated token: down to the device, up to the cloud", columns)


def gate_table(points: Sequence[GatePoint]) -> Html:
    """Thresholds of the gate with what they cost and give, by rising M."""
    is_rouge = points[0].get("rouge_l") is not None
    ordered = sorted(points, key=lambda point: point["M"])
    quality = [point.get("rouge_l") if is_rouge else point.get("nats_per_token") for point in ordered]
    columns = [
        Column(
            "Threshold",
            [_threshold(point["threshold"], bool(point.get("chosen"))) for point in ordered],
            is_number=False,
        ),
        Column("M", [escape(number(point["M"])) for point in ordered]),
        Column("Rouge-L" if is_rouge else "Nats per token", [escape(number(value)) for value in quality]),
    ]
    return table("Thresholds of the gate", columns)


def _rouge_cell(row: QualityRow, best: float | None) -> Html:
    interval = row.get("rouge_l_interval")
    whisker = f" <small>[{number(interval[0])}, {number(interval[1])}]</small>" if interval is not None else ""
    return Html(f"{_best(row.get('rouge_l'), best)}{whisker}")


def _best(value: float | None, best: float | None) -> Html:
    shown = escape(number(value))
    return Html(f"<strong>{shown}</strong>") if value is not None and value == best else shown


def _threshold(threshold: float, is_chosen: bool) -> Html:
    shown = escape(number(threshold))
    return Html(f'{shown} <span class="tag">chosen</span>') if is_chosen else shown

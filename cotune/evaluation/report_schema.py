"""What a report is made of. Only `title` and `summary` are required; a section without data is left out.

    metrics = {
        "title": "A personal plugin doubled the match, and stayed on the device",
        "summary": ["First sentence: the lead under the title.", "Then one sentence for each step that was taken."],
        "processes": {"cloud": ["pid 4711, port 8701"], "device": ["pid 4712, no torch"]},
        "model": "starter: 8 layers, 2.1 M parameters", "persona": "Mara: 12 private facts, terse style",
        "quality": [{"name": "base", "rouge_l": 0.21, "rouge_l_interval": [0.19, 0.23], "perplexity": 31.0}, ...],
        "examples": [{"prompt": ..., "reference": ..., "base_text": ..., "generation": {...}}, ...],
        "speed": [{"schedule": "optimistic", "answer": "correction", "rtt_ms": 50, "tokens_per_s": 25.4}, ...],
        "gate_curve": [{"threshold": 0.5, "M": 0.4, "rouge_l": 0.4, "chosen": True}, ...],
        "egress": {"correction": {"count": 412, "bytes": 41200, "why": "the side network's answers"}, ...},
        "cloud_sees": ["the prompt", ...], "cloud_does_not_see": ["the side network's weights", ...],
        "training": [{"name": "plugin", "points": [[0, 5.7], [10, 5.1], ...]}, ...],
        "config": {...}, "versions": {...}, "seeds": {...}, "repeat": ["cotune demo --seed 0"],
        "notes": {"quality": ["Plain LoRA is better where personal weights may live in the cloud."]},
    }

`metrics.json` may be such a dict with the keys of one `GenerationMetrics` beside these; then all of those are
there, and the report shows them too. `notes` are sentences under a section (see `SectionName`), shown where
the section is. All text is shown as text: markup in it is escaped.
"""

# No `from __future__ import annotations` here: TypedDict has to see Required to know which keys must be there.
from collections.abc import Mapping
from dataclasses import fields
from typing import Annotated, Any, Literal, Required, TypeAlias, TypedDict, cast

from cotune.errors import InputError
from cotune.evaluation.generation_metrics import GenerationMetrics
from cotune.evaluation.schema import Count, Quantity, Range, Share, check_type

SectionName: TypeAlias = Literal["story", "quality", "text", "speed", "gate", "egress", "training", "setup"]


class Processes(TypedDict):
    """The two sides, each told in short facts."""

    cloud: list[str]
    device: list[str]


class QualityRow(TypedDict, total=False):
    """One model on the held-out texts. Values not measured are absent or None."""

    name: Required[str]
    """base, lora and plugin have their own colours and feed the cards; any other name is shown as it is."""
    mode: str | None
    """The mode, for plugin rows."""
    rouge_l: Share | None
    rouge_l_interval: tuple[Share, Share] | None
    """(low, high), 95 %."""
    exact_match: Share | None
    token_f1: Share | None
    perplexity: Annotated[float, Range(1.0)] | None
    bits_per_byte: Quantity | None
    trainable_parameters: Count | None
    M: Quantity | None
    """Blocking round trips per token in the blocking or gated schedule."""


class Example(TypedDict, total=False):
    """One prompt answered without and with the plugin."""

    prompt: Required[str]
    reference: str | None
    """What the person wrote, where known."""
    base_text: str | None
    """What the base model wrote."""
    generation: Required[dict[str, object]]
    """`GenerationMetrics.to_dict()` of the personal text."""


class SpeedRow(TypedDict, total=False):
    """One way of generating at one round-trip time."""

    schedule: Required[str]
    answer: str | None
    """token or correction; None where nothing is asked."""
    mode: str | None
    rtt_ms: Required[Quantity]
    tokens_per_s: Required[Quantity]
    predicted_tokens_per_s: Quantity | None
    """What 1 / (c + M R) allows with the measured c (s per cloud step), M or q, and R."""
    M: Quantity | None
    disagree_rate: Share | None
    stall_ms_per_token: Quantity | None
    bytes_down_per_token: Quantity | None
    bytes_up_per_token: Quantity | None
    wasted_cloud_steps: Count | None


class GatePoint(TypedDict, total=False):
    """One threshold of the gate; every point of a curve has the same one of the two qualities."""

    threshold: Required[float]
    M: Required[Quantity]
    rouge_l: Share | None
    nats_per_token: Quantity | None
    chosen: bool
    """The threshold that the plugin keeps."""


class EgressRow(TypedDict, total=False):
    """All that left the device of one kind, from the ledger."""

    count: Required[Count]
    """How many times."""
    bytes: Required[Count]
    """How many bytes in all."""
    why: str | None
    """In plain words."""


class TrainingCurve(TypedDict, total=False):
    """Loss in nats per token while training."""

    name: Required[str]
    points: Required[list[tuple[Quantity, float]]]
    """(step, loss) in order, at least one."""
    held_out: list[tuple[Quantity, float]] | None
    """(step, loss) on texts that were not trained on, drawn dashed."""
    unit: str | None
    """What the steps count; "step" if absent. Curves with another unit get a plot of their own."""


class ReportMetrics(TypedDict, total=False):
    """See the top of this file."""

    title: Required[str]
    summary: Required[list[str]]
    processes: Processes | None
    model: str | None
    persona: str | None
    quality: list[QualityRow] | None
    examples: list[Example] | None
    speed: list[SpeedRow] | None
    gate_curve: list[GatePoint] | None
    egress: dict[str, EgressRow] | None
    cloud_sees: list[str] | None
    cloud_does_not_see: list[str] | None
    training: list[TrainingCurve] | None
    config: dict[str, object] | None
    versions: dict[str, object] | None
    seeds: dict[str, object] | None
    repeat: list[str] | None
    notes: dict[str, list[str]] | None


GENERATION_KEYS = tuple(field.name for field in fields(GenerationMetrics))


def check_report_metrics(metrics: Mapping[str, Any]) -> tuple[ReportMetrics, GenerationMetrics | None]:
    """Split `metrics` into the report's own part and the generation beside it, both checked.

    Raises:
        InputError: a missing or unknown key, or a value of another type or outside its range; names the place.
    """
    generation_part = {key: metrics[key] for key in GENERATION_KEYS if key in metrics}
    own_part = {key: value for key, value in metrics.items() if key not in GENERATION_KEYS}
    generation = GenerationMetrics.from_dict(generation_part) if generation_part else None
    check_type(own_part, ReportMetrics, "metrics")
    report = cast(ReportMetrics, own_part)
    _check_text(report)
    _check_numbers(report)
    return report, generation


def _check_text(report: ReportMetrics) -> None:
    if not report["title"].strip():
        raise InputError("metrics['title'] is empty, expected a sentence in plain words")
    if not report["summary"]:
        raise InputError("metrics['summary'] is empty, expected at least one sentence")
    for name in report.get("notes") or {}:
        check_type(name, SectionName, "a key of metrics['notes']")
    for index, example in enumerate(report.get("examples") or []):
        try:
            GenerationMetrics.from_dict(example["generation"])
        except InputError as error:
            raise InputError(f"metrics['examples'][{index}]['generation']: {error}") from error


def _check_numbers(report: ReportMetrics) -> None:
    for index, row in enumerate(report.get("quality") or []):
        interval = row.get("rouge_l_interval")
        if interval is not None and interval[0] > interval[1]:
            raise InputError(f"metrics['quality'][{index}]['rouge_l_interval'] is {interval}, expected [low, high]")
    ways = [(row["schedule"], row.get("answer"), row.get("mode"), row["rtt_ms"]) for row in report.get("speed") or []]
    if twice := [way for index, way in enumerate(ways) if way in ways[:index]]:
        raise InputError(f"metrics['speed'] has {twice[0]} twice, expected one row for each way and rtt_ms")
    points = report.get("gate_curve") or []
    kinds = {(point.get("rouge_l") is None, point.get("nats_per_token") is None) for point in points}
    if points and kinds not in ({(True, False)}, {(False, True)}):
        raise InputError(
            "metrics['gate_curve'] mixes qualities, expected 'rouge_l' on every point or 'nats_per_token' on every one"
        )
    for index, curve in enumerate(report.get("training") or []):
        if not curve["points"]:
            raise InputError(f"metrics['training'][{index}]['points'] is empty, expected [step, loss] pairs")

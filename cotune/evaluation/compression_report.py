"""The report card of a compression: size, memory, speed and quality of the model and after each stage, on one page."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Required, TypedDict

from cotune.evaluation.markup import (
    Column,
    Html,
    bullets,
    card,
    card_row,
    change,
    count,
    escape,
    figure,
    fold,
    join,
    number,
    paragraph,
    share,
    size,
    table,
)
from cotune.evaluation.plots import Bar, needs_log_axis, plot_bars
from cotune.evaluation.report import REPORT_NAME, Section, render_page, setup_section, write_page
from cotune.evaluation.svg import INK, render_svg, series_colour

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SOURCE = "source"
"""The kind of the first row."""

_MARKERS = ("o", "s", "^", "D", "v", "P", "X")
_SPEED_NOTES = (
    "Median of single passes, quartiles in brackets, on the machine that compressed, without adapters; other work on "
    "it makes them slower.",
    "torch is plain transformers, one token at a time with a cache; exported models run in their own runtime, which is "
    "most of the difference.",
    "Memory is by how much a process grows at most while it loads the model and writes once: weights included, "
    "libraries not.",
)
_QUALITY_NOTES = (
    "An exported model is judged by its own runtime, the others by PyTorch in float32 with the weights of their files.",
    "After quantising, what recovery learnt stays an adapter beside the model; the row has it on, and its size counts.",
)


class SpeedRow(TypedDict):
    """Tokens per second: the median and the quartiles."""

    median: float
    low: float
    high: float


class LayerRow(TypedDict):
    """One weight in a model's file: see `cotune.compression.stored_layers.StoredLayer`."""

    name: str
    shape: Sequence[int]
    bits: float
    code_bits: int
    sparsity: float


class CompressionRow(TypedDict, total=False):
    """The model, or what it is after one stage. What was not measured is absent or None."""

    name: Required[str]
    """For people: the stage."""
    kind: Required[str]
    """source, prune, distil, quantise, recover or export."""
    size_bytes: Required[int]
    """Of weights and graphs on disk, an adapter beside them included."""
    num_parameters: Required[int]
    runtime: str | None
    """torch, onnxruntime or llama.cpp."""
    dtype: str | None
    """Of the weights in torch."""
    num_threads: int | None
    prefill: SpeedRow | None
    decode: SpeedRow | None
    peak_bytes: int | None
    judgement: Mapping[str, Any] | None
    """Of `Judgement.to_dict()`."""
    layers: Sequence[LayerRow] | None
    """None where a runtime's own format hides them."""
    agreement: Mapping[str, Any] | None
    """Of an exported model with its source: num_prompts, num_tokens, num_same, num_texts_same, largest_error, and
    differences, sentences that say where and why; or error, why it was not compared."""
    notes: Sequence[str]
    """Sentences about this stage."""


def bits_per_weight(row: CompressionRow) -> float:
    """All bits on disk, over all numbers of the model."""
    return 8 * row["size_bytes"] / row["num_parameters"]


def write_compression_report(
    folder: Path,
    rows: Sequence[CompressionRow],
    *,
    title: str,
    repeat: str,
    settings: Mapping[str, Any],
    versions: Mapping[str, str],
) -> Path:
    """Write `folder/report.html`.

    Args:
        folder: made if it is not there.
        rows: the source first, then each stage.
        title: of the page.
        repeat: the command that does it again.
        settings, versions: of the run, to be shown.

    Raises:
        InputError: the folder cannot be written to, or matplotlib is not installed.
    """
    sections = [_stages_section(rows)]
    if any(row.get("decode") for row in rows):
        sections.append(_speed_section(rows))
    if any(row.get("agreement") for row in rows):
        sections.append(_agreement_section(rows))
    sections += [_layers_section(rows), setup_section(settings, repeat, versions)]
    page = render_page(
        title,
        _lead(rows),
        sections,
        cards=_cards(rows),
        as_json=json.dumps({"rows": list(rows), "settings": settings}, indent=1, ensure_ascii=False, allow_nan=False),
    )
    write_page(folder / REPORT_NAME, page)
    return folder / REPORT_NAME


def _lead(rows: Sequence[CompressionRow]) -> str:
    first, last = rows[0], rows[-1]
    stages = ", ".join(row["name"] for row in rows[1:])
    told = f"{stages}: {share(last['size_bytes'] / first['size_bytes'])} of the size on disk"
    before, after = _score(first, "perplexity"), _score(last, "perplexity")
    if before is not None and after is not None:
        told += f"; perplexity {number(before)} before, {number(after)} after"
    return told + "."


def _cards(rows: Sequence[CompressionRow]) -> Html:
    first, last = rows[0], rows[-1]
    cards = [
        card(
            change(size(first["size_bytes"]), size(last["size_bytes"])),
            "Size on disk",
            f"{number(bits_per_weight(last))} bits for each of {count(last['num_parameters'])} parameters",
        )
    ]
    for name, label in (("perplexity", "Perplexity"), ("rouge_l", "Rouge-L"), ("label_accuracy", "Accuracy")):
        before, after = _score(first, name), _score(last, name)
        if before is not None and after is not None:
            cards.append(card(change(number(before), number(after)), label, "on held-out texts"))
    before_speed, after_speed = first.get("decode"), last.get("decode")
    if before_speed and after_speed:
        words = f"{first.get('runtime')} before, {last.get('runtime')} after"
        shown = change(number(before_speed["median"]), number(after_speed["median"]))
        cards.append(card(shown, "Tokens per second", words))
    if first.get("peak_bytes") is not None and last.get("peak_bytes") is not None:
        cards.append(card(change(size(first["peak_bytes"]), size(last["peak_bytes"])), "Memory", "while it writes"))
    return card_row(cards)


def _stages_section(rows: Sequence[CompressionRow]) -> Section:
    plots = [
        figure(_plot(rows, name, label), f"{label} against size, stage by stage from the right.")
        for name, label in (("perplexity", "Perplexity (lower is better)"), ("rouge_l", "Rouge-L (higher is better)"))
        if any(_score(row, name) is not None for row in rows)
    ]
    if not plots:
        bars = [
            Bar(label=row["name"], value=float(row["size_bytes"]), text=size(row["size_bytes"]), series=0)
            for row in rows
        ]
        plots = [figure(plot_bars("sizes", bars, "Size on disk", tick_text=size), "Size on disk after each stage.")]
    first = rows[0]
    columns = [
        Column("Stage", [escape(_numbered(rows, index)) for index in range(len(rows))], is_number=False),
        Column("Size", [escape(size(row["size_bytes"])) for row in rows]),
        Column("Of source", [escape(share(row["size_bytes"] / first["size_bytes"])) for row in rows]),
        Column("Parameters", [escape(count(row["num_parameters"])) for row in rows]),
        Column("Bits", [escape(number(bits_per_weight(row))) for row in rows]),
        Column("Zeros", [escape(share(_sparsity(row))) for row in rows]),
    ]
    for name, head in (
        ("perplexity", "Perplexity"),
        ("rouge_l", "Rouge-L"),
        ("token_f1", "F1"),
        ("exact_match", "Exact match"),
        ("label_accuracy", "Accuracy"),
    ):
        if any(_score(row, name) is not None for row in rows):
            columns.append(Column(head, [escape(number(_score(row, name))) for row in rows]))
    remarks = [f"{row['name']}: {note}" for row in rows for note in row.get("notes", ())]
    content = [
        Html(f'<div class="grid">{join(plots)}</div>'),
        table("The source and each stage", columns),
        bullets([*dict.fromkeys(remarks), *_QUALITY_NOTES], css_class="remarks"),
    ]
    return Section(name="stages", short="Stages", heading="What each stage costs and gives", content=join(content))


def _plot(rows: Sequence[CompressionRow], name: str, label: str) -> Html:
    points = [
        (index, row["size_bytes"] / 1e6, score)
        for index, row in enumerate(rows)
        if (score := _score(row, name)) is not None
    ]
    described = f"{label} against size on disk. " + "; ".join(
        f"{rows[index]['name']}: {number(score)} at {number(megabytes)} MB" for index, megabytes, score in points
    )

    # Perplexities are at least 1; other scores may be 0, and never lie that far apart.
    is_log = name == "perplexity" and needs_log_axis([score for _, _, score in points])

    def draw(axes: Axes) -> None:
        axes.plot([x for _, x, _ in points], [y for _, _, y in points], color=INK, linewidth=0.8, alpha=0.5)
        for index, x, y in points:
            axes.plot(
                x,
                y,
                _MARKERS[index % len(_MARKERS)],
                color=series_colour(index),
                markersize=8,
                label=_numbered(rows, index),
            )
        if is_log:
            axes.set_yscale("log")
        axes.set_xlim(left=0.0)
        axes.margins(y=0.15)
        axes.set_xlabel("Size on disk (MB)")
        axes.set_ylabel(f"{label}, log scale" if is_log else label)
        axes.figure.legend(loc="outside lower left", ncols=2, handlelength=1.4, columnspacing=1.4)

    return render_svg(f"plot-{name.replace('_', '-')}", described, 3.0 + 0.13 * len(points), draw)


def _speed_section(rows: Sequence[CompressionRow]) -> Section:
    measured = [row for row in rows if row.get("decode")]
    bars = [
        Bar(
            label=row["name"],
            value=decode["median"],
            text=number(decode["median"]),
            series=0 if row.get("runtime") == "torch" else 1,
            interval=(decode["low"], decode["high"]),
        )
        for row in measured
        if (decode := row.get("decode"))
    ]
    columns = [
        Column("Stage", [escape(row["name"]) for row in measured], is_number=False),
        Column("Runtime", [escape(" ".join(_words(row))) for row in measured], is_number=False),
        Column("Prefill, tokens/s", [_speed(row.get("prefill")) for row in measured]),
        Column("Decode, tokens/s", [_speed(row.get("decode")) for row in measured]),
        Column("Memory", [escape(size(row.get("peak_bytes"))) for row in measured]),
    ]
    plot = figure(
        plot_bars("speed", bars, "New tokens per second", tick_text=number), "New tokens per second, with quartiles."
    )
    return Section(
        name="speed",
        short="Speed",
        heading="How fast it writes, and in how much memory",
        content=join(
            [
                plot,
                table("Speed and memory", columns),
                bullets(_SPEED_NOTES, css_class="remarks"),
            ]
        ),
    )


def _agreement_section(rows: Sequence[CompressionRow]) -> Section:
    parts: list[Html] = []
    for row in rows:
        found = row.get("agreement")
        if not found:
            continue
        if "error" in found:
            parts.append(paragraph(f"{row['name']} was not compared: {found['error']}."))
            continue
        parts.append(
            paragraph(
                f"{row['name']}: of {found['num_prompts']} greedy texts {found['num_texts_same']} are the source's "
                f"token by token; {found['num_same']} of {found['num_tokens']} choices on the source's own text are "
                f"the same; logits differ by up to {number(found['largest_error'])}. The source is the same weights in "
                "PyTorch, in float32."
            )
        )
        if found["differences"]:
            parts.append(fold("Where they differ first, and why", bullets(found["differences"])))
    return Section(
        name="tokens", short="Tokens", heading="Does the exported model write the same?", content=join(parts)
    )


def _layers_section(rows: Sequence[CompressionRow]) -> Section:
    parts: list[Html] = []
    for row in rows:
        layers = [layer for layer in row.get("layers") or () if len(layer["shape"]) > 1]
        if not layers:
            continue
        columns = [
            Column("Weight", [escape(layer["name"]) for layer in layers], is_number=False),
            Column("Shape", [escape(" x ".join(map(str, layer["shape"]))) for layer in layers]),
            Column("Bits", [escape(str(layer["code_bits"])) for layer in layers]),
            Column("With scales", [escape(number(layer["bits"])) for layer in layers]),
            Column("Zeros", [escape(share(layer["sparsity"])) for layer in layers]),
        ]
        parts.append(fold(f"{row['name']}: {len(layers)} matrices", table(f"Weights after: {row['name']}", columns)))
    told = paragraph("Bits and zeros of every weight matrix, as they lie in the files.")
    return Section(name="layers", short="Layers", heading="Layer by layer", content=join([told, *parts]))


def _score(row: CompressionRow, name: str) -> float | None:
    found = (row.get("judgement") or {}).get(name)
    return None if found is None else float(found)


def _sparsity(row: CompressionRow) -> float | None:
    """Of the weight matrices."""
    layers = [layer for layer in row.get("layers") or () if len(layer["shape"]) > 1]
    if not layers:
        return None
    numbers = [layer["shape"][0] * layer["shape"][1] for layer in layers]
    zeros = sum(num * layer["sparsity"] for num, layer in zip(numbers, layers, strict=True))
    return zeros / sum(numbers)


def _numbered(rows: Sequence[CompressionRow], index: int) -> str:
    return f"{index} {rows[index]['name']}"


def _words(row: CompressionRow) -> list[str]:
    threads = row.get("num_threads")
    words = [row.get("runtime") or "", row.get("dtype") or ""]
    if threads is not None:
        words.append(f"{threads} thread{'s' if threads > 1 else ''}")
    return [word for word in words if word]


def _speed(speed: SpeedRow | None) -> Html:
    if speed is None:
        return escape(number(None))
    return Html(f"{escape(number(speed['median']))} <small>[{number(speed['low'])}, {number(speed['high'])}]</small>")

"""The report's plots as inline SVG: deterministic, small, coloured by the page (light or dark) through CSS.

matplotlib draws with stand-in colours, which become `var(--...)`; text stays text in the page's own font. Nothing
in the SVG refers outside it. Each plot has a role and a label that tells its numbers to a screen reader.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cotune.errors import InputError
from cotune.evaluation.markup import Html, escape, number, plain, size
from cotune.evaluation.report_schema import EgressRow, GatePoint, QualityRow, SpeedRow, TrainingCurve

if TYPE_CHECKING:
    from matplotlib.axes import Axes

NUM_SERIES = 7  # --s0 to --s6 in report.html, after Okabe and Ito's colour-blind-safe palette
_INK, _MUTED, _LINE, _CARD = "#010203", "#010204", "#010205", "#010206"
_SERIES = tuple(f"#0102{0x10 + index:02x}" for index in range(NUM_SERIES))
_CSS_COLOURS = {_INK: "--ink", _MUTED: "--muted", _LINE: "--line", _CARD: "--card"} | {
    colour: f"--s{index}" for index, colour in enumerate(_SERIES)
}
_MARKERS = ("o", "s", "^", "D", "v", "P", "X")
_WIDTH_INCHES = 5.4
_STYLE: dict[Any, Any] = {
    "axes.axisbelow": True,
    "axes.edgecolor": _LINE,
    "axes.facecolor": "none",
    "axes.grid": True,
    "axes.labelcolor": _MUTED,
    "axes.linewidth": 0.8,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "figure.facecolor": "none",
    "figure.constrained_layout.use": True,
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 9.5,
    "grid.color": _LINE,
    "grid.linewidth": 0.6,
    "legend.fontsize": 9.0,
    "legend.frameon": False,
    "legend.labelcolor": _INK,
    "lines.linewidth": 1.8,
    "lines.markersize": 5.0,
    "svg.fonttype": "none",
    "svg.hashsalt": "cotune",
    "text.color": _INK,
    "text.parse_math": False,
    "xtick.color": _MUTED,
    "ytick.color": _MUTED,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "xtick.minor.size": 0,
    "ytick.minor.size": 0,
}
_NO_METADATA = dict.fromkeys(("Creator", "Date", "Format", "Type"))
_NAMED_SERIES = {"base": 6, "lora": 1, "plugin": 0}


@dataclass(frozen=True, kw_only=True)
class Bar:
    """One horizontal bar."""

    label: str
    value: float
    text: str
    """Written at its end."""
    series: int
    """Which colour."""
    interval: tuple[float, float] | None = None
    """Drawn as a whisker."""


def plot_bars(name: str, bars: Sequence[Bar], axis_label: str) -> Html:
    """Horizontal bars from top to bottom, each with its value in words."""
    described = f"Bar plot, {axis_label}. " + "; ".join(f"{bar.label}: {bar.text}" for bar in bars) + "."

    def draw(axes: Axes) -> None:
        positions = range(len(bars))
        axes.barh(positions, [bar.value for bar in bars], height=0.62, color=[_colour(bar.series) for bar in bars])
        reach = max((bar.interval[1] if bar.interval else bar.value for bar in bars), default=0.0) or 1.0
        for position, bar in zip(positions, bars, strict=True):
            end = bar.value
            if bar.interval is not None:
                axes.plot(bar.interval, (position, position), color=_INK, linewidth=1.4, solid_capstyle="butt")
                axes.plot(bar.interval, (position, position), "|", color=_INK, markersize=7)
                end = max(end, bar.interval[1])
            axes.text(end + 0.02 * reach, position, plain(bar.text), va="center", fontsize=9.0)
        axes.set_yticks(positions, [plain(bar.label) for bar in bars])
        axes.tick_params(axis="y", labelcolor=_INK)
        axes.set_xlim(0.0, 1.24 * reach)
        axes.invert_yaxis()
        axes.grid(visible=False, axis="y")
        axes.spines["left"].set_visible(False)
        axes.set_xlabel(plain(axis_label))

    return _render(name, described, 0.75 + 0.36 * len(bars), draw)


def plot_quality(rows: Sequence[QualityRow]) -> Html:
    """Rouge-L of each model with its interval."""
    measured = [row for row in rows if row.get("rouge_l") is not None]
    return plot_bars("rouge", [_quality_bar(row, "rouge_l") for row in measured], "Rouge-L F1 (longer is better)")


def plot_perplexity(rows: Sequence[QualityRow]) -> Html:
    """Perplexity of each model."""
    measured = [row for row in rows if row.get("perplexity") is not None]
    bars = [_quality_bar(row, "perplexity") for row in measured]
    return plot_bars("perplexity", bars, "Perplexity (shorter is better)")


def plot_egress(egress: Mapping[str, EgressRow]) -> Html:
    """Bytes that left the device, by kind."""
    bars = [
        Bar(label=kind, value=float(row["bytes"]), text=size(row["bytes"]), series=0) for kind, row in egress.items()
    ]
    return plot_bars("egress", bars, "Bytes that left the device")


def plot_speed(series: Mapping[str, Sequence[SpeedRow]]) -> Html:
    """Tokens per second against round-trip time; predictions dashed."""
    described = "Line plot of tokens per second against round-trip time. " + " ".join(
        f"{label}: " + ", ".join(f"{number(row['tokens_per_s'])} at {row['rtt_ms']:g} ms" for row in rows) + "."
        for label, rows in series.items()
    )

    def draw(axes: Axes) -> None:
        for index, (label, rows) in enumerate(series.items()):
            times = [row["rtt_ms"] for row in rows]
            _line(axes, index, times, [row["tokens_per_s"] for row in rows], label)
            promised = [(row["rtt_ms"], row.get("predicted_tokens_per_s")) for row in rows]
            known = [(rtt_ms, rate) for rtt_ms, rate in promised if rate is not None]
            if known:
                axes.plot(*zip(*known, strict=True), "--", color=_colour(index), linewidth=1.1, alpha=0.9)
        if any(row.get("predicted_tokens_per_s") is not None for rows in series.values() for row in rows):
            axes.plot([], [], "--", color=_MUTED, linewidth=1.1, label="predicted: 1 / (c + M R)")
        axes.set_ylim(bottom=0.0)
        axes.set_xlabel("Round-trip time (ms)")
        axes.set_ylabel("Tokens per second")
        _legend(axes)

    return _render("speed", described, 3.0 + 0.12 * len(series), draw)


def plot_gate(points: Sequence[GatePoint]) -> Html:
    """Quality against M, one dot for each threshold; the chosen one is ringed."""
    is_rouge = points[0].get("rouge_l") is not None
    axis_label = "Rouge-L F1 (higher is better)" if is_rouge else "Nats per token (lower is better)"
    curve = sorted((point["M"], _gate_quality(point)) for point in points)
    chosen = [(point["M"], _gate_quality(point)) for point in points if point.get("chosen")]
    described = f"Line plot of {axis_label} against M. " + ", ".join(
        f"{number(quality)} at M = {number(trips)}" for trips, quality in curve
    )

    def draw(axes: Axes) -> None:
        _line(axes, 0, [trips for trips, _ in curve], [quality for _, quality in curve], "thresholds")
        for trips, quality in chosen:
            axes.plot(trips, quality, "o", color=_colour(1), markersize=12, fillstyle="none", markeredgewidth=2)
            axes.annotate("chosen", (trips, quality), (0, -19), textcoords="offset points", ha="center", color=_INK)
        axes.margins(0.08, 0.16)
        axes.set_xlabel("M: blocking round trips per token")
        axes.set_ylabel(axis_label)

    return _render("gate", described, 2.9, draw)


def plot_training(name: str, unit: str, curves: Sequence[TrainingCurve]) -> Html:
    """Loss while training; losses on held-out texts dashed."""
    described = f"Line plot of the loss in nats per token against {unit}. " + " ".join(
        f"{curve['name']}: from {number(curve['points'][0][1])} to {number(curve['points'][-1][1])}."
        for curve in curves
    )

    def draw(axes: Axes) -> None:
        for index, curve in enumerate(curves):
            style: dict[str, Any] = {"color": _colour(index), "linewidth": 1.6}
            axes.plot(*zip(*curve["points"], strict=True), label=plain(curve["name"]), **style)
            if held_out := curve.get("held_out"):
                axes.plot(
                    *zip(*held_out, strict=True),
                    "--",
                    marker=_MARKERS[index % NUM_SERIES],
                    markersize=4,
                    label=plain(f"{curve['name']}, held-out"),
                    **style,
                )
        axes.set_xlabel(plain(unit.capitalize()))
        axes.set_ylabel("Loss (nats per token)")
        _legend(axes)

    return _render(name, described, 3.0, draw)


def quality_label(row: QualityRow) -> str:
    """How a row of the quality table is called."""
    known = {"base": "Base model", "lora": "LoRA", "plugin": "Plugin"}
    name, mode = known.get(row["name"], row["name"]), row.get("mode")
    return f"{name}, {mode}" if mode else name


def _quality_bar(row: QualityRow, key: str) -> Bar:
    value = float(row[key])  # type: ignore[literal-required]
    return Bar(
        label=quality_label(row),
        value=value,
        text=number(value),
        series=_NAMED_SERIES.get(row["name"], 2),
        interval=row.get("rouge_l_interval") if key == "rouge_l" else None,
    )


def _gate_quality(point: GatePoint) -> float:
    rouge = point.get("rouge_l")
    return float(rouge if rouge is not None else point.get("nats_per_token") or 0.0)


def _line(axes: Axes, index: int, xs: Sequence[float], ys: Sequence[float], label: str) -> None:
    axes.plot(xs, ys, marker=_MARKERS[index % NUM_SERIES], color=_colour(index), label=plain(label))


def _legend(axes: Axes) -> None:
    axes.figure.legend(loc="outside lower left", ncols=2, handlelength=2.2, columnspacing=1.4)


def _colour(index: int) -> str:
    return _SERIES[index % NUM_SERIES]


def _render(name: str, description: str, height_inches: float, draw: Callable[[Axes], None]) -> Html:
    with _drawing() as matplotlib:
        figure = matplotlib.figure.Figure(figsize=(_WIDTH_INCHES, height_inches))
        draw(figure.add_subplot())
        written = io.StringIO()
        figure.savefig(written, format="svg", metadata=_NO_METADATA)
    return _inline(written.getvalue(), name, description)


@contextmanager
def _drawing() -> Iterator[Any]:
    """matplotlib in its default style plus ours, whatever the user's own settings, which come back after."""
    try:
        import matplotlib
        import matplotlib.figure
    except ImportError as error:
        raise InputError("the report's plots need matplotlib; pip install 'cotune[train]'") from error
    with matplotlib.rc_context(), warnings.catch_warnings():
        # The browser's fonts draw the text; that the measuring font lacks a glyph does not matter.
        warnings.filterwarnings("ignore", message="Glyph .* missing from", category=UserWarning)
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_STYLE)
        yield matplotlib


def _inline(svg: str, name: str, description: str) -> Html:
    """An SVG file made fit to stand in a page beside others: no prolog, no global style, names of its own."""
    view_box = re.search(r'viewBox="([^"]*)"', svg)
    assert view_box is not None, "matplotlib wrote an SVG without a viewBox"
    body = svg[svg.index(">", svg.index("<svg")) + 1 :]
    body = re.sub(r"<style[^>]*>.*?</style>|<metadata>.*?</metadata>|<!--.*?-->", "", body, flags=re.DOTALL)
    body = re.sub(r"<[^<>]*>", lambda tag: _inline_tag(tag.group(), name), body)  # tags only, never the text
    body = re.sub(r"\s*\n\s*", "\n", body)
    return Html(f'<svg viewBox="{view_box.group(1)}" role="img" aria-label="{escape(description)}">{body}')


def _inline_tag(tag: str, name: str) -> str:
    tag = re.sub(r'^<g id="[^"]*"', "<g", tag)
    tag = re.sub(r' id="([^"]*)"', rf' id="{name}-\1"', tag)
    tag = re.sub(r' (?:xlink:)?href="#([^"]*)"', rf' href="#{name}-\1"', tag)
    tag = tag.replace("url(#", f"url(#{name}-").replace("'DejaVu Sans', sans-serif", "var(--font)")
    tag = re.sub(r"(\.\d\d)\d+", r"\1", tag)  # a hundredth of a point is enough
    for stand_in, variable in _CSS_COLOURS.items():
        tag = tag.replace(stand_in, f"var({variable})")
    return tag

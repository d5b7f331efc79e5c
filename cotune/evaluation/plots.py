"""The report's plots: what is drawn, and what a screen reader says about it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cotune.evaluation.markup import Html, number, plain, size
from cotune.evaluation.report_schema import EgressRow, GatePoint, QualityRow, SpeedRow, TrainingCurve
from cotune.evaluation.svg import INK, MUTED, render_svg, series_colour

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_MARKERS = ("o", "s", "^", "D", "v", "P", "X")
_NAMED_SERIES = {"base": 6, "lora": 1, "plugin": 0}
_LONGEST_LABEL = 28
_LOG_SPREAD = 50.0


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


def plot_bars(
    name: str,
    bars: Sequence[Bar],
    axis_label: str,
    *,
    tick_text: Callable[[float], str] = "{:g}".format,
    is_log: bool = False,
) -> Html:
    """Horizontal bars from top to bottom, each with its value in words.

    Args:
        tick_text: words the numbers of the axis.
        is_log: logarithmic axis from 1 on, for values that are at least 1.
    """
    described = f"Bar plot, {axis_label}. " + "; ".join(f"{bar.label}: {bar.text}" for bar in bars) + "."
    reach = max((bar.interval[1] if bar.interval else bar.value for bar in bars), default=0.0) or 1.0

    def draw(axes: Axes) -> None:
        positions = range(len(bars))
        colours = [series_colour(bar.series) for bar in bars]
        axes.barh(positions, [bar.value for bar in bars], height=0.62, color=colours)
        for position, bar in zip(positions, bars, strict=True):
            end = bar.value
            if bar.interval is not None:
                axes.plot(bar.interval, (position, position), color=INK, linewidth=1.4, solid_capstyle="butt")
                axes.plot(bar.interval, (position, position), "|", color=INK, markersize=7)
                end = max(end, bar.interval[1])
            axes.annotate(
                plain(bar.text), (end, position), (5, 0), textcoords="offset points", va="center", fontsize=9.5
            )
        axes.set_yticks(positions, [_label(bar.label) for bar in bars])
        axes.tick_params(axis="y", labelcolor=INK)
        if is_log:
            axes.set_xscale("log")
            axes.xaxis.set_minor_formatter(lambda *_: "")
        else:
            axes.locator_params(axis="x", nbins=6)
        axes.set_xlim(*((1.0, reach**1.24) if is_log else (0.0, 1.24 * reach)))
        axes.xaxis.set_major_formatter(lambda value, _: tick_text(value))
        axes.invert_yaxis()
        axes.grid(visible=False, axis="y")
        axes.spines["left"].set_visible(False)
        axes.set_xlabel(plain(axis_label))

    return render_svg(name, described, 0.75 + 0.36 * len(bars), draw)


def needs_log_axis(values: Sequence[float]) -> bool:
    """Whether positive values lie so far apart that a linear axis would show the small ones as one.

    Example:
        >>> needs_log_axis([1.0, 40.0]), needs_log_axis([1.0, 60.0])
        (False, True)
    """
    return max(values) > _LOG_SPREAD * min(values)


def plot_quality(rows: Sequence[QualityRow]) -> Html:
    """Rouge-L of each model with its interval."""
    measured = [row for row in rows if row.get("rouge_l") is not None]
    return plot_bars("rouge", [_quality_bar(row, "rouge_l") for row in measured], "Rouge-L F1 (longer is better)")


def plot_perplexity(rows: Sequence[QualityRow]) -> Html:
    """Perplexity of each model."""
    measured = [row for row in rows if row.get("perplexity") is not None]
    bars = [_quality_bar(row, "perplexity") for row in measured]
    values = [bar.value for bar in bars]
    is_log = needs_log_axis(values)
    axis_label = "Perplexity, log scale (shorter is better)" if is_log else "Perplexity (shorter is better)"
    return plot_bars("perplexity", bars, axis_label, is_log=is_log)


def plot_egress(egress: Mapping[str, EgressRow]) -> Html:
    """Bytes that left the device, by kind."""
    bars = [
        Bar(label=kind, value=float(row["bytes"]), text=size(row["bytes"]), series=0) for kind, row in egress.items()
    ]
    return plot_bars("egress", bars, "Bytes that left the device", tick_text=size)


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
                axes.plot(*zip(*known, strict=True), "--", color=series_colour(index), linewidth=1.1, alpha=0.9)
        if any(row.get("predicted_tokens_per_s") is not None for rows in series.values() for row in rows):
            axes.plot([], [], "--", color=MUTED, linewidth=1.1, label="predicted: 1 / (c + M R)")
        axes.set_ylim(bottom=0.0)
        axes.set_xlabel("Round-trip time (ms)")
        axes.set_ylabel("Tokens per second")
        _legend(axes)

    return render_svg("speed", described, 3.0 + 0.12 * len(series), draw)


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
            axes.plot(trips, quality, "o", color=series_colour(1), markersize=12, fillstyle="none", markeredgewidth=2)
            axes.annotate("chosen", (trips, quality), (0, -19), textcoords="offset points", ha="center", color=INK)
        axes.margins(0.08, 0.16)
        axes.set_xlabel("M: blocking round trips per token")
        axes.set_ylabel(axis_label)

    return render_svg("gate", described, 2.9, draw)


def plot_training(name: str, unit: str, curves: Sequence[TrainingCurve], *, loss: str = "nats per token") -> Html:
    """Loss while training, in the unit `loss`; losses on held-out texts dashed."""
    described = f"Line plot of the loss in {loss} against {unit}. " + " ".join(
        f"{curve['name']}: from {number(curve['points'][0][1])} to {number(curve['points'][-1][1])}."
        for curve in curves
    )

    def draw(axes: Axes) -> None:
        for index, curve in enumerate(curves):
            style: dict[str, Any] = {"color": series_colour(index), "linewidth": 1.6}
            mark = "o" if len(curve["points"]) == 1 else ""
            axes.plot(*zip(*curve["points"], strict=True), marker=mark, label=_label(curve["name"]), **style)
            if held_out := curve.get("held_out"):
                axes.plot(
                    *zip(*held_out, strict=True),
                    "--",
                    marker=_MARKERS[index % len(_MARKERS)],
                    markersize=4,
                    label=_label(f"{curve['name']}, held-out"),
                    **style,
                )
        if all(float(step).is_integer() for curve in curves for step, _ in curve["points"]):
            axes.locator_params(axis="x", integer=True)
        axes.set_xlabel(plain(unit.capitalize()))
        axes.set_ylabel(plain(f"Loss ({loss})"))
        _legend(axes)

    return render_svg(name, described, 3.0, draw)


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
    axes.plot(xs, ys, marker=_MARKERS[index % len(_MARKERS)], color=series_colour(index), label=_label(label))


def _label(text: str) -> str:
    """Short enough to leave room for the plot; matplotlib would hide a label that starts with an underscore."""
    words = " ".join(plain(text).split())
    shown = words if len(words) <= _LONGEST_LABEL else words[: _LONGEST_LABEL - 1] + "…"
    return f" {shown}" if shown.startswith("_") else shown


def _legend(axes: Axes) -> None:
    axes.figure.legend(loc="outside lower left", ncols=2, handlelength=2.2, columnspacing=1.4)

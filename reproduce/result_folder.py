"""The folder of a study: settings, what the paper says, what was measured, and a page to look at."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, is_dataclass
from pathlib import Path
from textwrap import wrap
from typing import TYPE_CHECKING, Any

from cotune.cli.run_folder import write_json
from cotune.evaluation.markup import Column, Html, bullets, escape, facts, figure, table
from cotune.evaluation.report import Section, render_page, write_page
from cotune.evaluation.svg import INK, render_svg, series_colour

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# A line of a plot: its x and y, and the ends of the intervals of y where they are known.
Point = tuple[float, float, float | None, float | None]
# Under the axis of a bar plot; from so many groups on its letters are smaller.
_AXIS_CHARS, _MANY_GROUPS = 72, 5
_MARKERS = ("o", "s", "^", "D", "v", "P", "X")


def write_results(
    folder: Path,
    *,
    title: str,
    lead: str,
    about: Mapping[str, Any],
    expected: Mapping[str, Any],
    measured: Mapping[str, Any],
    sections: Sequence[Section],
    deviations: Sequence[str],
) -> None:
    """Write `config.json`, `expected.json`, `measured.json` and `report.html`.

    Args:
        folder: made where it is not there.
        title, lead: of the page.
        about: settings, versions and hardware, from `Study.describe`.
        expected: what the paper says.
        measured: what came.
        sections: of the page, the tables and plots.
        deviations: where this study is another one than the paper's, a sentence each.
    """
    folder.mkdir(parents=True, exist_ok=True)
    known = _plain({"about": about, "expected": expected, "measured": measured, "deviations": list(deviations)})
    write_json(folder / "config.json", {**known["about"], "deviations": known["deviations"]})
    write_json(folder / "expected.json", known["expected"])
    write_json(folder / "measured.json", known["measured"])
    settings = [(name, _words(value)) for name, value in known["about"]["config"].items()]
    last = Section(
        name="setting",
        short="Setting",
        heading="How it was measured",
        content=Html(bullets(deviations) + facts([*settings, ("hardware", _words(known["about"]["hardware"]))])),
    )
    page = render_page(title, lead, [*sections, last], as_json=json.dumps(known, indent=1, ensure_ascii=False))
    write_page(folder / "report.html", page)


def grid(caption: str, head: str, rows: Sequence[str], columns: Mapping[str, Sequence[str]]) -> Html:
    """A table of words: one row for each name, one column for each key."""
    return table(
        caption,
        [
            Column(head, [escape(row) for row in rows], is_number=False),
            *(Column(name, [escape(cell) for cell in cells]) for name, cells in columns.items()),
        ],
    )


def plot_lines(
    name: str, caption: str, lines: Mapping[str, Sequence[Point]], *, x_label: str, y_label: str, is_log_x: bool = False
) -> Html:
    """Lines with the intervals of their points."""
    described = f"Line plot, {y_label} against {x_label}. " + " ".join(
        f"{label}: " + ", ".join(f"{y:.3g} at {x:g}" for x, y, _, _ in points) + "." for label, points in lines.items()
    )

    def draw(axes: Axes) -> None:
        for index, (label, points) in enumerate(lines.items()):
            colour = series_colour(index)
            xs, ys = [point[0] for point in points], [point[1] for point in points]
            axes.plot(xs, ys, marker=_MARKERS[index % len(_MARKERS)], color=colour, label=label)
            for x, _, low, high in points:
                if low is not None and high is not None:
                    axes.plot((x, x), (low, high), color=colour, linewidth=1.0)
        if is_log_x:
            axes.set_xscale("log")
            # Matplotlib's own labels are TeX, which an SVG of words shows as it is written.
            places = sorted({x for points in lines.values() for x, *_ in points})
            axes.set_xticks(places, [f"{place:g}" for place in places])
            axes.minorticks_off()
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)
        axes.figure.legend(loc="outside lower left", ncols=2, handlelength=2.2, columnspacing=1.4)

    return figure(render_svg(name, described, 3.2, draw), caption)


def plot_groups(
    name: str, caption: str, groups: Sequence[str], bars: Mapping[str, Sequence[Point | None]], *, y_label: str
) -> Html:
    """Bars side by side for each group, with intervals; `Point`'s x is not used."""
    width = 0.8 / len(bars)
    described = f"Bar plot, {y_label}. " + " ".join(
        f"{label}: "
        + ", ".join(f"{group} {one[1]:.3g}" for group, one in zip(groups, values, strict=True) if one is not None)
        + "."
        for label, values in bars.items()
    )

    def draw(axes: Axes) -> None:
        for index, (label, values) in enumerate(bars.items()):
            places = [i + (index - (len(bars) - 1) / 2) * width for i in range(len(groups))]
            heights = [0.0 if one is None else one[1] for one in values]
            axes.bar(places, heights, width=0.92 * width, color=series_colour(index), label=label)
            for place, one in zip(places, values, strict=True):
                if one is not None and one[2] is not None and one[3] is not None:
                    axes.plot((place, place), (max(0.0, one[2]), one[3]), color=INK, linewidth=1.0)
        axes.set_xticks(range(len(groups)), in_lines(groups))
        if len(groups) > _MANY_GROUPS:
            axes.tick_params(axis="x", labelsize="small")
        axes.set_ylabel(y_label)
        axes.grid(visible=False, axis="x")
        axes.figure.legend(loc="outside lower left", ncols=3, handlelength=1.2, columnspacing=1.2)

    return figure(render_svg(name, described, 3.2, draw), caption)


def in_lines(labels: Sequence[str]) -> list[str]:
    """Labels of an axis, in lines short enough to stand beside each other.

    Example:
        >>> in_lines(["full", "lora + checkpoints", "soft_prompt", "mezo, lora", "bias", "ia3", "prefix"])[1:3]
        ['lora +\\ncheckpoints', 'soft\\nprompt']
    """
    width = max(6, _AXIS_CHARS // max(1, len(labels)))
    split = [label if len(label) <= width else label.replace("_", " ") for label in labels]
    return ["\n".join(wrap(label, width, break_long_words=False)) for label in split]


def _words(value: Any) -> str:
    """A setting as people read it."""
    if value is None:
        return "none"
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_words(one)}" for name, one in value.items())
    if isinstance(value, list):
        return ", ".join(map(_words, value))
    return str(value)


def _plain(value: Any) -> Any:
    if is_dataclass(value) and not isinstance(value, type):
        return _plain(asdict(value))
    if isinstance(value, Mapping):
        return {str(key): _plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    return value

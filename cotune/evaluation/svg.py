"""matplotlib figures as inline SVG: deterministic, small, coloured by the page (light or dark) through CSS.

matplotlib draws with stand-in colours, which become `var(--...)`; text stays text, in the page's own font. Nothing
in the SVG refers outside it, and its names do not clash with those of another one in the same page.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from cotune.errors import InputError
from cotune.evaluation.markup import Html, escape

if TYPE_CHECKING:
    from matplotlib.axes import Axes

NUM_SERIES = 7  # --s0 to --s6 in report.html, after Okabe and Ito's colour-blind-safe palette
INK, MUTED, LINE = "#010203", "#010204", "#010205"
_SERIES = tuple(f"#0102{0x10 + index:02x}" for index in range(NUM_SERIES))
_CSS_COLOURS = {INK: "--ink", MUTED: "--muted", LINE: "--line"} | {
    colour: f"--s{index}" for index, colour in enumerate(_SERIES)
}
_WIDTH_INCHES = 5.0
_STYLE: dict[Any, Any] = {
    "axes.axisbelow": True,
    "axes.edgecolor": LINE,
    "axes.facecolor": "none",
    "axes.grid": True,
    "axes.labelcolor": MUTED,
    "axes.linewidth": 0.8,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "figure.facecolor": "none",
    "figure.constrained_layout.use": True,
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 10.0,
    "grid.color": LINE,
    "grid.linewidth": 0.6,
    "legend.fontsize": 9.5,
    "legend.frameon": False,
    "legend.labelcolor": INK,
    "lines.linewidth": 1.8,
    "lines.markersize": 5.0,
    "svg.fonttype": "none",
    "svg.hashsalt": "cotune",
    "text.color": INK,
    "text.parse_math": False,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "xtick.minor.size": 0,
    "ytick.minor.size": 0,
}


def series_colour(index: int) -> str:
    """The stand-in colour of the data series `index`; they repeat after NUM_SERIES."""
    return _SERIES[index % NUM_SERIES]


def render_svg(name: str, description: str, height_inches: float, draw: Callable[[Axes], None]) -> Html:
    """Draw one figure with one pair of axes.

    Args:
        name: prefix of the names inside the SVG, unlike that of any other figure in the page.
        description: what a screen reader says; plain text.
        height_inches: 72 units each; the figure is 5 inches wide.
        draw: draws into the axes, with the stand-in colours of this module.

    Raises:
        InputError: matplotlib is not installed.
    """
    with _drawing() as matplotlib:
        figure = matplotlib.figure.Figure(figsize=(_WIDTH_INCHES, height_inches))
        draw(figure.add_subplot())
        written = io.StringIO()
        figure.savefig(written, format="svg")  # _inline drops the metadata, and so the date
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
    view_box = re.search(r'viewBox="([^"]*)"', svg)
    assert view_box is not None, "matplotlib wrote an SVG without a viewBox"
    body = svg[svg.index(">", svg.index("<svg")) + 1 :]
    body = re.sub(r"<style[^>]*>.*?</style>|<metadata>.*?</metadata>", "", body, flags=re.DOTALL)
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

from __future__ import annotations

import re
import sys
from typing import Any

import matplotlib
import pytest

from cotune.errors import InputError
from cotune.evaluation.svg import INK, MUTED, render_svg, series_colour


def draw(axes: Any) -> None:
    axes.plot([0, 1, 2], [1, 3, 2], "o-", color=series_colour(1), label="$a_1$ <b> 漢 url(#x)")
    axes.plot([0, 1], [2, 2], "--", color=MUTED)
    axes.text(0, 1, INK, color=INK)
    axes.figure.legend()


def test_the_same_figure_gives_the_same_svg() -> None:
    assert render_svg("one", "d", 2.0, draw) == render_svg("one", "d", 2.0, draw)


def test_stands_alone_in_a_page() -> None:
    svg = render_svg("one", 'a "line"', 2.0, draw)
    assert svg.startswith("<svg viewBox=")
    assert 'role="img" aria-label="a &quot;line&quot;"' in svg
    assert not re.search(r"https?:|<style|<metadata|<!--|<\?xml|xmlns|xlink", svg)
    names = set(re.findall(r' id="([^"]*)"', svg))
    assert names
    assert all(name.startswith("one-") for name in names)
    assert set(re.findall(r'href="#([^"]*)"|style="[^"]*url\(#([^)]*)\)', svg)) <= {(name, "") for name in names}


def test_colours_follow_the_page_and_text_stays_text() -> None:
    svg = render_svg("one", "d", 2.0, draw)
    tags = "".join(re.findall(r"<[^<>]*>", svg))
    assert "stroke: var(--s1)" in tags
    assert "fill: var(--ink)" in tags
    assert "#0102" not in tags
    assert f">{INK}</text>" in svg
    assert "$a_1$ &lt;b&gt; 漢 url(#x)</text>" in svg
    assert "font-family: var(--font)" in tags


def test_the_settings_of_matplotlib_neither_matter_nor_change() -> None:
    before, usual = dict(matplotlib.rcParams), render_svg("one", "d", 2.0, draw)
    with matplotlib.rc_context({"xtick.labelsize": 40.0, "font.size": 40.0}):
        assert render_svg("one", "d", 2.0, draw) == usual
        assert matplotlib.rcParams["font.size"] == 40.0
    assert dict(matplotlib.rcParams) == before


def test_series_colours_differ_and_repeat() -> None:
    assert len({series_colour(index) for index in range(7)}) == 7
    assert series_colour(7) == series_colour(0)


def test_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(InputError, match=r"cotune\[train\]"):
        render_svg("one", "d", 2.0, draw)

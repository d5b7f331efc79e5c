from __future__ import annotations

import os
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from evaluation.report_example import HOSTILE, generation, report_metrics

from cotune.errors import InputError
from cotune.evaluation.report import render_report, write_report

VOID_TAGS = {"meta", "path", "use", "rect", "g"}


class Page(HTMLParser):
    """Every tag with its attributes, and whether the tags nest."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(source)
        self.close()

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture(scope="module")
def hostile() -> Page:
    return Page(render_report(report_metrics(HOSTILE) | generation(HOSTILE).to_dict()))


@pytest.fixture(scope="module")
def source() -> str:
    """The page of an ordinary run."""
    return render_report(report_metrics())


def test_all_sections_in_order(source: str) -> None:
    page = Page(source)
    sections = [attributes["id"] for tag, attributes in page.tags if tag == "section"]
    assert sections == ["story", "quality", "text", "speed", "gate", "egress", "training", "setup"]
    links = [attributes["href"] for tag, attributes in page.tags if tag == "a"]
    assert links == ["#content", *(f"#{name}" for name in sections)]


def test_sections_without_data_are_left_out_and_the_rest_is_numbered() -> None:
    metrics = {key: value for key, value in report_metrics().items() if key in ("title", "summary", "egress")}
    page = render_report(metrics)
    assert re.findall(r'<section id="(\w+)"', page) == ["story", "egress"]
    assert re.findall(r'class="index">(\d)<', page) == ["1", "2"]
    bare = render_report({"title": "t", "summary": ["One sentence."]})
    assert "<section" not in bare
    assert "One sentence." in bare


def test_untrusted_text_is_shown_and_never_acts(hostile: Page) -> None:
    assert HOSTILE in hostile.text
    tags = {tag for tag, _ in hostile.tags}
    assert not tags & {"script", "img", "iframe", "object", "embed", "link", "base", "form", "image"}
    for _, attributes in hostile.tags:
        assert not any(name.startswith("on") for name in attributes)
    assert hostile.open == []


def test_loads_nothing_from_anywhere(hostile: Page, source: str) -> None:
    for tag, attributes in hostile.tags:
        for name in ("src", "href", "xlink:href", "action", "data", "srcset"):
            assert (attributes.get(name) or "#").startswith("#"), (tag, name)
        assert not re.search(r"url\((?!#)", attributes.get("style") or "")
    assert not re.search(r"https?://|@import|url\((?!#)", source)
    assert "default-src 'none'" in source


def test_names_inside_are_unique_and_found(hostile: Page) -> None:
    names = [attributes["id"] for _, attributes in hostile.tags if "id" in attributes]
    assert len(names) == len(set(names))
    for _, attributes in hostile.tags:
        wanted = attributes.get("href"), *re.findall(r"url\((#[^)]*)\)", attributes.get("clip-path") or "")
        assert all(name is None or name[1:] in names for name in wanted)


def test_plots_and_tables_speak(hostile: Page) -> None:
    drawings = [attributes for tag, attributes in hostile.tags if tag == "svg"]
    assert len(drawings) >= 6
    assert all(drawing["role"] == "img" and drawing["aria-label"] for drawing in drawings)
    assert all(attributes.get("scope") in ("row", "col") for tag, attributes in hostile.tags if tag == "th")
    assert dict(hostile.tags)["html"] == {"lang": "en"}


def test_holds_its_numbers_as_json(source: str) -> None:
    assert "&quot;tokens_per_s&quot;: 25.0" in source


def test_the_same_metrics_give_the_same_bytes_in_a_new_folder_without_a_draft(tmp_path: Path, source: str) -> None:
    path = write_report(tmp_path / "runs" / "demo", report_metrics())
    assert path == tmp_path / "runs" / "demo" / "report.html"
    assert path.read_bytes() == source.encode()
    assert [entry.name for entry in path.parent.iterdir()] == ["report.html"]


def test_a_failed_write_keeps_the_old_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_report(tmp_path, {"title": "old", "summary": ["s"]})
    before = path.read_bytes()

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(InputError, match="No space left on device"):
        write_report(tmp_path, {"title": "new", "summary": ["s"]})
    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["report.html"]


def test_bad_metrics_write_nothing(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="unknown keys"):
        write_report(tmp_path / "new", {"title": "t", "summary": ["s"], "speeed": []})
    with pytest.raises(InputError, match="cannot be written as JSON"):
        write_report(tmp_path / "new", {"title": "t", "summary": ["s"], "config": {"path": tmp_path}})
    assert not (tmp_path / "new").exists()


def test_a_file_in_the_place_of_the_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match="cannot be written"):
        write_report(tmp_path / "file", {"title": "t", "summary": ["s"]})
    assert (tmp_path / "file").read_text() == "x"

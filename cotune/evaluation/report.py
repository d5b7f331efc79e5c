"""Write `report.html`: one file that needs nothing else, safe to open, the same for the same numbers."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any

from cotune.durable import replacing
from cotune.errors import InputError
from cotune.evaluation.markup import NO_HTML, Html, bullets, escape, fold, join, paragraph
from cotune.evaluation.report_cards import key_cards
from cotune.evaluation.report_schema import check_report_metrics
from cotune.evaluation.report_sections import SECTIONS
from cotune.evaluation.setup_content import SETUP_HEADING, setup_content

REPORT_NAME = "report.html"


def write_report(folder: Path | str, metrics: Mapping[str, Any]) -> Path:
    """Write `folder/report.html`; the old one stays whole until the new one is.

    Args:
        folder: made if it is not there.
        metrics: see `cotune.evaluation.report_schema`.

    Returns:
        Path of the report.

    Raises:
        InputError: metrics that do not fit the schema, a folder that cannot be written to, or matplotlib is
            not installed; nothing is written then.

    Example:
        >>> write_report("runs/demo", {"title": "It works", "summary": ["Both sides spoke."]})  # doctest: +SKIP
        PosixPath('runs/demo/report.html')
    """
    page = render_report(metrics)
    target = Path(folder) / REPORT_NAME
    write_page(target, page)
    return target


def render_report(metrics: Mapping[str, Any]) -> str:
    """The report as one string of HTML, a function of `metrics` alone.

    Raises:
        InputError: as `write_report`.
    """
    report, generation = check_report_metrics(metrics)
    as_json = _to_json(metrics)
    notes = report.get("notes") or {}
    sections: list[Section] = []
    for name, (short, heading, build) in SECTIONS.items():
        content = build(report, generation)
        if content is not None:
            remarks = bullets(notes.get(name, []), css_class="remarks")
            sections.append(Section(name=name, short=short, heading=heading, content=Html(content + remarks)))
    return render_page(
        report["title"], report["summary"][0], sections, cards=key_cards(report, generation), as_json=as_json
    )


@dataclass(frozen=True, kw_only=True)
class Section:
    """One part of a page: `name` for links to it, `short` in the navigation, `heading` above its content."""

    name: str
    short: str
    heading: str
    content: Html


def setup_section(settings: Mapping[str, Any], repeat: str, versions: Mapping[str, str]) -> Section:
    """The last section of a page.

    Args:
        settings: of the run.
        repeat: the command that does it again.
        versions: by library.
    """
    content = setup_content(settings, repeat=[repeat], versions=versions) or NO_HTML
    return Section(name="setup", short="Set-up", heading=SETUP_HEADING, content=content)


def render_page(title: str, lead: str, sections: Sequence[Section], *, cards: Html = NO_HTML, as_json: str) -> str:
    """A whole page in the report's form: one file that needs nothing else.

    Args:
        title, lead: plain text.
        sections: in order.
        cards: the numbers at the top.
        as_json: all numbers, for those who want to compute with them.
    """
    links = [Html(f'<li><a href="#{section.name}">{escape(section.short)}</a></li>') for section in sections]
    parts = [
        Html(
            f'<section id="{section.name}" aria-labelledby="{section.name}-heading"><h2 id="{section.name}-heading">'
            f'<span class="index">{index}</span>{escape(section.heading)}</h2>{section.content}</section>'
        )
        for index, section in enumerate(sections, start=1)
    ]
    template = Template(files("cotune.evaluation").joinpath(REPORT_NAME).read_text(encoding="utf-8"))
    return template.substitute(
        title=escape(title),
        lead=paragraph(lead, "lead"),
        navigation=join(links),
        cards=cards,
        sections=join(parts, "\n"),
        data=fold("All numbers of this report as JSON", Html(f'<pre class="code">{escape(as_json)}</pre>')),
    )


def write_page(target: Path, page: str) -> None:
    """Write a page; the old one stays whole until the new one is.

    Raises:
        InputError: its folder cannot be written to.
    """
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with replacing(target, mode=None) as draft:
            draft.write_text(page, encoding="utf-8", newline="\n")
    except OSError as error:
        raise InputError(
            f"{target} cannot be written ({error.strerror}), expected a folder with room and leave to write"
        ) from error


def _to_json(metrics: Mapping[str, Any]) -> str:
    try:
        return json.dumps(dict(metrics), indent=1, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise InputError(f"metrics cannot be written as JSON, expected plain values: {error}") from error

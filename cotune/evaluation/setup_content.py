"""What the last section of each report says: how to repeat the run, on which versions, with which settings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from cotune.evaluation.markup import Html, dotted, escape, facts, fold, join

SETUP_HEADING = "Set-up, and how to repeat it"


def setup_content(
    settings: Mapping[str, Any] | None,
    *,
    repeat: Sequence[str] = (),
    versions: Mapping[str, object] | None = None,
    seeds: Mapping[str, object] | None = None,
) -> Html | None:
    """What there is of it; None where there is nothing.

    Args:
        settings: of the run, nested as they are; what is None or empty is left out.
        repeat: command lines that do it again.
        versions: by library.
        seeds: by name.

    Example:
        >>> content = setup_content({"rank": 8, "alpha": None}, repeat=["cotune demo --seed 1"])
        >>> "cotune demo --seed 1" in content, "alpha" in content
        (True, False)
    """
    parts = []
    if repeat:
        lines = escape("\n".join(repeat))
        parts.append(Html(f'<h3>Repeat this run</h3><pre class="code">{lines}</pre>'))
    panels = [
        Html(f'<div class="panel"><h3>{title}</h3>{facts((name, str(value)) for name, value in dotted(values))}</div>')
        for title, values in (("Seeds", seeds), ("Versions", versions))
        if values
    ]
    if panels:
        parts.append(Html(f'<div class="grid">{join(panels)}</div>'))
    shown = [(name, str(value)) for name, value in dotted(settings or {}) if value is not None and value != {}]
    if shown:
        parts.append(fold("The whole configuration", facts(shown)))
    return join(parts) if parts else None

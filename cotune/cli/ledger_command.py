"""`cotune ledger`: what left the device."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table

from cotune.cli.output import print_json, stdout
from cotune.ledger import EgressLedger, total_entries


def ledger(
    run: Annotated[Path, typer.Argument(help="A run folder, or a ledger file itself.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Show what left the device in a run: how many frames and bytes of each kind.

    Examples:

        cotune ledger runs/demo

        cotune ledger runs/demo/ledger.jsonl --json
    """
    path = run / "ledger.jsonl" if run.is_dir() else run
    totals = total_entries(EgressLedger.read(path))
    if as_json:
        print_json({"path": str(path), "egress": totals})
        return
    table = Table("kind", "times", "bytes", title=f"left the device, by {escape(str(path))}")
    for column in table.columns[1:]:
        column.justify = "right"
    for kind, total in sorted(totals.items(), key=lambda item: -item[1]["bytes"]):
        table.add_row(kind, f"{total['count']:,}", f"{total['bytes']:,}")
    table.add_row(
        "[bold]all",
        f"{sum(t['count'] for t in totals.values()):,}",
        f"[bold]{sum(t['bytes'] for t in totals.values()):,}",
    )
    stdout.print(table)

"""What a federated run leaves: `rounds.jsonl`, `metrics.json`, `report.html`; of a run over Flower the adapter, too."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape

from cotune.cli.output import print_json, stderr
from cotune.cli.run_folder import command_line, plain, versions, write_json
from cotune.durable import is_free, replacing
from cotune.errors import InputError

if TYPE_CHECKING:
    from cotune.federation.coordinator import Progress, RoundRecord
    from cotune.federation.settings import FederationSettings

ROUNDS_FILE = "rounds.jsonl"
METRICS_FILE = "metrics.json"
# Where peft says what an adapter is.
RESULT_FILE = "adapter_config.json"


def result(
    run: Annotated[Path, typer.Argument(help="The folder of a run over Flower, on the SuperLink's machine.")],
    out: Annotated[Path, typer.Option(help="Folder for the adapter.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Write what a run over Flower has learnt so far: its adapter, and rounds.jsonl and report.html in its folder.

    It may still be running. OUT is a peft adapter: judge it with `cotune evaluate MODEL DATA --lora OUT`.

    Example:

        cotune federate result run-1 --out my-adapter
    """
    check_out(out)
    # Only now: it asks for Flower.
    from cotune.federation.flower.server_folder import ServerFolder

    folder = ServerFolder.read(run)
    at = folder.progress()
    folder.save_adapter(at, out)
    summary = summary_of(folder.settings, at, out, run, num_devices=len(folder.registry.devices))
    write_result(folder.path, folder.settings, at, summary)
    if as_json:
        print_json(summary)
        return
    print_summary(summary)


def check_out(out: Path) -> None:
    """Refuse to write an adapter over anything but an earlier one.

    Raises:
        InputError: something else is there, or it names no folder.
    """
    if not out.name:
        raise InputError(f"--out is {str(out)!r}, expected the name of a new folder; give one")
    if not is_free(out, earlier=RESULT_FILE):
        raise InputError(f"--out is {out}, which holds something else; give a new folder")


def summary_of(settings: FederationSettings, at: Progress, out: Path, run: Path, *, num_devices: int) -> dict[str, Any]:
    """A run in numbers."""
    from cotune.evaluation.federation_report import bytes_per_reply
    from cotune.federation.run_privacy import account_as_table

    rows: list[Any] = [asdict(one) for one in at.records]
    accepted = [one for one in at.records if one.verdict == "accepted"]
    return {
        "algorithm": settings.algorithm,
        "out": str(out),
        "run": str(run),
        "num_rounds": len(at.records),
        "num_accepted": len(accepted),
        "num_devices": num_devices,
        "start_nats_per_token": at.start_loss,
        "heldout_nats_per_token": next(
            (one.heldout_loss for one in reversed(accepted) if one.heldout_loss is not None), None
        ),
        "bytes_up": sum(sum(one.bytes_up.values()) for one in at.records),
        "bytes_down": sum(sum(one.bytes_down.values()) for one in at.records),
        "bytes_per_device_and_round": bytes_per_reply(rows),
        "bytes_per_device_after_the_first_round": bytes_per_reply(rows[1:]) if len(rows) > 1 else None,
        "privacy": account_as_table(settings.privacy, at.released_rounds) or None,
        "audit": None,
        "report": str(run / "report.html"),
    }


def write_result(run: Path, settings: FederationSettings, at: Progress, summary: Mapping[str, Any]) -> None:
    """The files of the run's folder; no report before the first round.

    Raises:
        InputError: the folder cannot be written to, or matplotlib is not installed.
    """
    from cotune.evaluation.federation_report import write_federation_report

    write_rounds(run, at.records)
    write_json(run / METRICS_FILE, summary)
    rows: list[Any] = [asdict(one) for one in at.records]
    if rows:
        write_federation_report(
            run,
            rows,
            title=f"Federated tuning with {settings.algorithm}",
            start_loss=at.start_loss,
            repeat=command_line(),
            settings=plain(settings),
            versions=versions(),
            summary=summary,
        )


def write_rounds(run: Path, records: Iterable[RoundRecord]) -> None:
    """`rounds.jsonl`, whole or not at all."""
    lines = "".join(json.dumps(asdict(one), allow_nan=False) + "\n" for one in records)
    with replacing(run / ROUNDS_FILE, mode=0o644) as unfinished:
        unfinished.write_text(lines, encoding="utf-8")


def print_summary(summary: Mapping[str, Any]) -> None:
    """What people are told at the end."""
    after = summary["bytes_per_device_after_the_first_round"]
    stderr.print(
        f"[bold]{summary['algorithm']}[/] {escape(summary['out'])}: {summary['num_accepted']} of "
        f"{summary['num_rounds']} rounds accepted, {summary['bytes_per_device_and_round']:,.0f} bytes for a device in "
        "a round" + ("" if after is None else f", {after:,.0f} after the first"),
        soft_wrap=True,
    )
    if not summary["num_accepted"]:
        stderr.print("nothing was learnt: the adapter is the one that the run began with", soft_wrap=True)
    if "proxy_download_bytes" in summary:
        stderr.print(
            f"once: the proxy, {summary['proxy_download_bytes']:,} bytes, for each of "
            f"{summary['num_devices_with_proxy']} devices; with that {summary['bytes_down_with_proxy']:,} bytes down",
            soft_wrap=True,
        )
    if summary["heldout_nats_per_token"] is not None:
        stderr.print(
            f"held-out loss {summary['start_nats_per_token']:.3f} (start) -> "
            f"{summary['heldout_nats_per_token']:.3f} nats per token"
        )
    account, audit = summary["privacy"], summary["audit"]
    if account:
        stderr.print(escape(f"privacy: {account['summary']}. It rests on this:"), soft_wrap=True)
        for sentence in account["assumptions"]:
            stderr.print(escape(f"- {sentence}"), soft_wrap=True)
    if audit:
        beside = f"; the account says {account['epsilon']:.2f}" if account else "; there is no account without noise"
        stderr.print(escape(f"audit: {audit['summary']}{beside}"), soft_wrap=True)
    if summary["num_rounds"]:
        stderr.print(f"report: {escape(summary['report'])}", soft_wrap=True)

"""The page of a federated run: losses, bytes and devices by round, in the form of the other reports."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NotRequired, TypedDict

from cotune.evaluation.markup import (
    Column,
    Html,
    bullets,
    card,
    card_row,
    count,
    escape,
    figure,
    join,
    number,
    paragraph,
    share,
    size,
    table,
)
from cotune.evaluation.plots import Bar, plot_bars, plot_training
from cotune.evaluation.report import REPORT_NAME, Section, render_page, setup_section, write_page
from cotune.evaluation.report_schema import TrainingCurve

_BYTES_NOTES = (
    "All bytes of all messages are counted, both ways: numbers, names, settings and signatures.",
    "Framing is what is not numbers. TLS and the transport below add to it.",
)
_LOSS_NOTES = (
    "The devices' loss is the mean of what they report from their own texts, and is not noised.",
    "The held-out loss is of texts that no device has. Rounds in which it rose too far are taken back.",
)


class RoundRow(TypedDict):
    """One round, as `rounds.jsonl` has it; see `cotune.federation.coordinator.RoundRecord`."""

    round_number: int
    verdict: str
    remark: str
    asked: list[str]
    counted: list[str]
    refused: dict[str, str]
    lost: list[str]
    loss: float | None
    heldout_loss: float | None
    bytes_down: dict[str, int]
    bytes_up: dict[str, int]
    seconds: float
    device_seconds: float | None
    device_peak_bytes: int | None
    device_held_bytes: NotRequired[int | None]
    shown: dict[str, float]


def write_federation_report(
    folder: Path,
    rounds: Sequence[RoundRow],
    *,
    title: str,
    start_loss: float | None,
    repeat: str,
    settings: Mapping[str, Any],
    versions: Mapping[str, str],
    summary: Mapping[str, Any],
) -> Path:
    """Write `folder/report.html`.

    Args:
        folder: made if it is not there.
        rounds: at least one.
        title: of the page.
        start_loss: held-out loss before round 1, nats per token.
        repeat: the command that does it again.
        settings, versions: of the run, to be shown.
        summary: for whoever wants the numbers; `privacy`, an account with its `summary` and `assumptions`, and `audit`,
            with a `summary`, and `proxy_download_bytes` are shown.

    Raises:
        InputError: the folder cannot be written to, or matplotlib is not installed.
    """
    sections = [_loss_section(rounds, start_loss), _bytes_section(rounds), _rounds_section(rounds)]
    if summary.get("privacy") or summary.get("audit"):
        sections.append(_privacy_section(summary.get("privacy"), summary.get("audit")))
    sections.append(setup_section(settings, repeat, versions))
    page = render_page(
        title,
        _lead(rounds, start_loss),
        sections,
        cards=_cards(rounds, start_loss, int(summary.get("proxy_download_bytes", 0))),
        as_json=json.dumps({"summary": summary, "rounds": list(rounds)}, indent=1, ensure_ascii=False, allow_nan=False),
    )
    write_page(folder / REPORT_NAME, page)
    return folder / REPORT_NAME


def _accepted(rounds: Sequence[RoundRow]) -> list[RoundRow]:
    return [one for one in rounds if one["verdict"] == "accepted"]


def _last_loss(rounds: Sequence[RoundRow]) -> float | None:
    return next((one["heldout_loss"] for one in reversed(_accepted(rounds)) if one["heldout_loss"] is not None), None)


def _lead(rounds: Sequence[RoundRow], start_loss: float | None) -> str:
    told = f"{len(_accepted(rounds))} of {len(rounds)} rounds were accepted."
    last = _last_loss(rounds)
    if start_loss is not None and last is not None:
        told += f" The held-out loss went from {number(start_loss)} to {number(last)} nats per token."
    return told


def bytes_per_reply(rounds: Sequence[RoundRow]) -> float:
    """Mean bytes of a device in a round, both ways together."""
    num = sum(len(one["asked"]) for one in rounds)
    return sum(sum(one["bytes_up"].values()) + sum(one["bytes_down"].values()) for one in rounds) / max(1, num)


def _cards(rounds: Sequence[RoundRow], start_loss: float | None, once: int) -> Html:
    cards = []
    last = _last_loss(rounds)
    if last is not None:
        note = "" if start_loss is None else f"{number(start_loss)} before"
        cards.append(card(escape(number(last)), "Held-out nats per token", note))
    # The first round brings the adapter itself.
    later = f"; {size(bytes_per_reply(rounds[1:]))} after the first" if len(rounds) > 1 else ""
    cards.append(card(escape(size(bytes_per_reply(rounds))), "A device in a round", f"both ways, all counted{later}"))
    asked, counted = sum(len(one["asked"]) for one in rounds), sum(len(one["counted"]) for one in rounds)
    cards.append(card(escape(share(counted / max(1, asked))), "Replies that counted", f"{counted} of {asked}"))
    peaks = [one["device_peak_bytes"] for one in rounds if one["device_peak_bytes"] is not None]
    if peaks:
        cards.append(card(escape(size(max(peaks))), "Largest memory of a device", "resident set, model included"))
    held = [one.get("device_held_bytes") for one in rounds]
    if any(held):
        note = "weights, gradients and optimiser of one model at a time"
        cards.append(card(escape(size(max(one or 0 for one in held))), "Most that a device held", note))
    if once:
        cards.append(card(escape(size(once)), "Downloaded once", "the proxy, for each device that has it"))
    return card_row(cards)


def _loss_section(rounds: Sequence[RoundRow], start_loss: float | None) -> Section:
    heldout: list[tuple[float, float]] = []
    own: list[tuple[float, float]] = []
    for one in rounds:
        for points, loss in ((heldout, one["heldout_loss"]), (own, one["loss"])):
            if loss is not None:
                points.append((one["round_number"], loss))
    if start_loss is not None:
        heldout.insert(0, (0, start_loss))
    curves: list[TrainingCurve] = []
    if own:
        curves.append({"name": "devices", "points": own})
    if heldout:
        curves.append({"name": "held-out texts", "points": heldout})
    plot = figure(plot_training("losses", "round", curves), "Losses by round") if curves else paragraph("No losses.")
    return Section(
        name="loss",
        short="Loss",
        heading="How well it learns",
        content=join([plot, bullets(_LOSS_NOTES, css_class="remarks")]),
    )


def _bytes_section(rounds: Sequence[RoundRow]) -> Section:
    ways = {"up": "bytes_up", "down": "bytes_down"}
    totals = {way: Counter[str]() for way in ways}
    for one in rounds:
        for way, key in ways.items():
            totals[way].update(one[key])  # type: ignore[literal-required]
    bars = [
        Bar(label=f"{kind}, {way}", value=float(num), text=size(num), series=index)
        for index, way in enumerate(ways)
        for kind, num in totals[way].most_common()
    ]
    total = sum(sum(counter.values()) for counter in totals.values())
    each = size(bytes_per_reply(rounds))
    told = f"All rounds together: {size(total)}. A device sends and receives {each} in a round."
    plot = figure(plot_bars("bytes", bars, "Bytes of all rounds", tick_text=size), "Bytes by kind") if bars else ""
    return Section(
        name="bytes",
        short="Bytes",
        heading="What went over the wire",
        content=join([paragraph(told), Html(plot), bullets(_BYTES_NOTES, css_class="remarks")]),
    )


def _privacy_section(account: Mapping[str, Any] | None, audit: Mapping[str, Any] | None) -> Section:
    parts = []
    if account:
        parts.append(paragraph(f"Spent: {account['summary']}. It rests on this:"))
        parts.append(bullets(account["assumptions"]))
    else:
        parts.append(paragraph("No noise was added, so there is no promise."))
    if audit:
        parts.append(paragraph(f"Made-up devices in this run found: {audit['summary']}."))
    return Section(name="privacy", short="Privacy", heading="What it gives away of a device", content=join(parts))


def _numbers(values: Sequence[float | None]) -> list[Html]:
    """Of one column: counts where all of them are whole."""
    are_whole = all(one is None or float(one).is_integer() for one in values)
    return [escape("" if one is None else count(int(one)) if are_whole else number(one)) for one in values]


def _rounds_section(rounds: Sequence[RoundRow]) -> Section:
    def text(value: float | None) -> Html:
        return escape("" if value is None else number(value))

    refused = [(one["round_number"], device, why) for one in rounds for device, why in one["refused"].items()]
    lost = Counter(device for one in rounds for device in one["lost"])
    shown = sorted({name for one in rounds for name in one["shown"]})
    parts = [
        table(
            "Rounds",
            [
                Column("Round", [escape(count(one["round_number"])) for one in rounds]),
                Column("Verdict", [escape(one["verdict"]) for one in rounds], is_number=False),
                Column("Replies", [escape(f"{len(one['counted'])} of {len(one['asked'])}") for one in rounds]),
                Column("Devices' loss", [text(one["loss"]) for one in rounds]),
                Column("Held-out loss", [text(one["heldout_loss"]) for one in rounds]),
                Column("Up", [escape(size(sum(one["bytes_up"].values()))) for one in rounds]),
                Column("Down", [escape(size(sum(one["bytes_down"].values()))) for one in rounds]),
                Column("Seconds", [text(one["seconds"]) for one in rounds]),
                Column("Device seconds", [text(one["device_seconds"]) for one in rounds]),
                *(
                    Column(name.replace("_", " ").capitalize(), _numbers([one["shown"].get(name) for one in rounds]))
                    for name in shown
                ),
            ],
        )
    ]
    if refused:
        parts.append(
            table(
                "Refused replies",
                [
                    Column("Round", [escape(count(one[0])) for one in refused]),
                    Column("Device", [escape(one[1]) for one in refused], is_number=False),
                    Column("Why", [escape(one[2]) for one in refused], is_number=False),
                ],
            )
        )
    remarks = [f"Round {one['round_number']}: {one['remark']}." for one in rounds if one["remark"]]
    remarks += [f"{device} was lost {'once' if num == 1 else f'{num} times'}." for device, num in lost.most_common(10)]
    if remarks:
        parts.append(bullets(remarks, css_class="remarks"))
    return Section(name="rounds", short="Rounds", heading="Round by round", content=join(parts))

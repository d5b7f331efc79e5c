"""The page of a tuning run: losses by epoch, and what it cost beside what was predicted."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypedDict

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
    size,
    table,
)
from cotune.evaluation.plots import plot_training
from cotune.evaluation.report import REPORT_NAME, Section, render_page, setup_section, write_page
from cotune.evaluation.report_schema import TrainingCurve
from cotune.evaluation.tuning_cost import RunCost

_MEMORY_NOTES = (
    "Memory is what the process held at most while it tuned, beyond what it held with the model loaded. On a CPU "
    "that is the resident set, with libraries that were read meanwhile and what the allocator kept: tens of MB that "
    "weigh in small models alone.",
    "Predictions are those of cotune plan, from the shape of the model and the longest texts of a step.",
    "Tokens are those of the training texts, each as often as it was read; seconds have the held-out losses in them.",
)


class EpochRow(TypedDict):
    """One epoch, as the loop records it; epoch 0 is the start."""

    epoch: int
    num_steps: int
    train_loss: float | None
    heldout_loss: float | None
    elapsed_s: float


def write_tuning_report(
    folder: Path,
    epochs: Sequence[EpochRow],
    cost: RunCost,
    *,
    title: str,
    loss: str,
    num_parameters: int,
    best_epoch: int,
    repeat: str,
    settings: Mapping[str, Any],
    versions: Mapping[str, str],
    privacy: tuple[str, Sequence[str]] | None = None,
    remarks: Sequence[str] = (),
) -> Path:
    """Write `folder/report.html`.

    Args:
        folder: made if it is not there.
        epochs: at least the start.
        cost: of the run.
        title: of the page.
        loss: what the losses are, such as "nats per token".
        num_parameters: that were trained.
        best_epoch: whose parameters are the result.
        repeat: the command that does it again.
        settings, versions: of the run, to be shown.
        privacy: what was spent, and what that rests on.
        remarks: on the losses.

    Raises:
        InputError: the folder cannot be written to, or matplotlib is not installed.
    """
    sections = [_loss_section(epochs, loss, remarks), _cost_section(cost, num_parameters)]
    if privacy is not None:
        spent, assumptions = privacy
        content = join([paragraph(f"Spent: {spent}. It rests on this:"), bullets(assumptions)])
        sections.append(
            Section(name="privacy", short="Privacy", heading="What it gives away of a text", content=content)
        )
    sections.append(setup_section(settings, repeat, versions))
    page = render_page(
        title,
        _lead(epochs, best_epoch, loss),
        sections,
        cards=_cards(epochs, cost, num_parameters, best_epoch, loss),
        as_json=json.dumps(
            {"epochs": list(epochs), "cost": asdict(cost)}, indent=1, ensure_ascii=False, allow_nan=False
        ),
    )
    write_page(folder / REPORT_NAME, page)
    return folder / REPORT_NAME


def _heldout(epochs: Sequence[EpochRow], best_epoch: int) -> tuple[float, float] | None:
    """At the start and in the best epoch."""
    losses = {row["epoch"]: row["heldout_loss"] for row in epochs}
    before, after = losses.get(0), losses.get(best_epoch)
    return None if before is None or after is None else (before, after)


def _lead(epochs: Sequence[EpochRow], best_epoch: int, loss: str) -> str:
    heldout = _heldout(epochs, best_epoch)
    if heldout is None:
        return "No texts were held out, so the last epoch is the result."
    before, after = (number(each) for each in heldout)
    if best_epoch == 0:
        return f"No epoch had a smaller loss on the held-out texts than the start ({before}, {loss}): nothing changed."
    return (
        f"The loss on the held-out texts ({loss}) went from {before} to {after}; epoch {best_epoch} of "
        f"{epochs[-1]['epoch']} is the result."
    )


def _cards(epochs: Sequence[EpochRow], cost: RunCost, num_parameters: int, best_epoch: int, loss: str) -> Html:
    cards = []
    heldout = _heldout(epochs, best_epoch)
    if heldout is not None:
        cards.append(card(escape(number(heldout[1])), f"Held-out loss, {loss}", f"{number(heldout[0])} at the start"))
    else:
        cards.append(card(escape(count(num_parameters)), "Trained parameters"))
    if cost.peak_bytes is not None:
        note = "" if cost.predicted is None else f"{size(cost.predicted.peak_bytes)} predicted"
        cards.append(card(escape(size(cost.peak_bytes)), "Memory above the model", note))
    if cost.tokens_per_s is not None:
        cards.append(
            card(escape(number(cost.tokens_per_s)), "Tokens per second", f"{number(cost.seconds)} s of training")
        )
    return card_row(cards)


def _loss_section(epochs: Sequence[EpochRow], loss: str, remarks: Sequence[str]) -> Section:
    trained = [(float(row["num_steps"]), row["train_loss"]) for row in epochs if row["train_loss"] is not None]
    heldout = [(float(row["num_steps"]), row["heldout_loss"]) for row in epochs if row["heldout_loss"] is not None]
    curves: list[TrainingCurve] = []
    if trained:
        curves.append({"name": "training texts", "points": trained})
    if heldout:
        curves.append({"name": "held-out texts", "points": heldout})
    plot = (
        figure(plot_training("losses", "step", curves, loss=loss), f"Mean loss of each epoch, {loss}")
        if curves
        else Html("")
    )

    def text(value: float | None) -> Html:
        return escape("" if value is None else number(value))

    rows = table(
        "Epochs",
        [
            Column("Epoch", [escape(count(row["epoch"])) for row in epochs]),
            Column("Steps", [escape(count(row["num_steps"])) for row in epochs]),
            Column("Training loss", [text(row["train_loss"]) for row in epochs]),
            Column("Held-out loss", [text(row["heldout_loss"]) for row in epochs]),
            Column("Seconds", [text(row["elapsed_s"]) for row in epochs]),
        ],
    )
    notes = bullets(remarks, css_class="remarks") if remarks else Html("")
    return Section(name="loss", short="Loss", heading="How well it learns", content=join([plot, rows, notes]))


def _cost_section(cost: RunCost, num_parameters: int) -> Section:
    known = cost.predicted
    rows = [
        ("Memory above the model", size(cost.peak_bytes), size(None if known is None else known.peak_bytes)),
        ("Operations of a step", number(None), number(None) if known is None else f"{known.flops / 1e9:,.2f} GFLOP"),
        ("Trained parameters", count(num_parameters), number(None)),
        ("Steps", count(cost.num_steps), number(None)),
        ("Tokens read", count(cost.num_tokens), number(None)),
        ("Tokens per second", number(cost.tokens_per_s), number(None)),
        ("Seconds", number(cost.seconds), number(None)),
    ]
    content = table(
        "Measured and predicted",
        [
            Column("", [escape(name) for name, _, _ in rows], is_number=False),
            Column("Measured", [escape(measured) for _, measured, _ in rows]),
            Column("Predicted", [escape(predicted) for _, _, predicted in rows]),
        ],
    )
    notes = list(_MEMORY_NOTES)
    if known is None:
        notes.append("The planner has no prediction for this method on this model.")
    return Section(
        name="cost",
        short="Cost",
        heading="What it took",
        content=join([content, bullets(notes, css_class="remarks")]),
    )

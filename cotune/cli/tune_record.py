"""What `cotune tune` leaves in the run's folder when it is over: `summary.json` and `report.html`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from cotune.cli.run_folder import command_line, versions, write_json
from cotune.cli.tune_settings import Summary, Trained, TuneSettings
from cotune.evaluation.method_cost import MethodSettings
from cotune.evaluation.tuning_cost import Predicted, RunCost, predict_run
from cotune.evaluation.tuning_report import EpochRow, write_tuning_report
from cotune.evaluation.workload import Workload

if TYPE_CHECKING:
    from cotune.models.backbone import Backbone

SUMMARY_FILE = "summary.json"
_SIDE_REMARKS = (
    "These are the losses and seconds of the side network's own training, from features: making these and learning the "
    "gate are not in the seconds.",
    "Half of the held-out texts chose the epoch here; what cotune tune prints is the loss on the other half.",
)


def record_run(
    backbone: Backbone,
    settings: TuneSettings,
    trained: Trained,
    peak_bytes: int | None,
    shown: Mapping[str, object],
) -> Summary:
    """Write both files.

    Args:
        backbone: that was tuned on.
        settings: as asked for.
        trained: how it went.
        peak_bytes: measured, above the loaded model; a run that was resumed has the most of all its parts.
        shown: settings for the page.

    Returns:
        What `summary.json` has.
    """
    last = trained.curve[-1]
    cost = RunCost(
        num_steps=last.num_steps,
        num_tokens=last.epoch * sum(len(text.input_ids) for text in trained.texts),
        seconds=last.elapsed_s,
        peak_bytes=_most(peak_bytes, _earlier_peak(settings.run) if settings.resume else None),
        predicted=_predicted(backbone, settings, trained),
    )
    summary = {
        "method": settings.method,
        "out": str(settings.out),
        "run": str(settings.run),
        **trained.summary,
        "seconds": cost.seconds,
        "tokens_per_s": cost.tokens_per_s,
        "peak_bytes": cost.peak_bytes,
        "predicted_peak_bytes": None if cost.predicted is None else cost.predicted.peak_bytes,
    }
    privacy = summary.get("privacy")
    write_tuning_report(
        settings.run,
        [cast(EpochRow, asdict(record)) for record in trained.curve],
        cost,
        title=f"{settings.method} on {Path(settings.model).name}",
        loss="nats per token" if settings.objective == "nats" else f"1 - {settings.objective}",
        num_parameters=summary["num_parameters"],
        best_epoch=trained.best_epoch,
        repeat=command_line(),
        settings=shown,
        versions=versions(),
        privacy=None if privacy is None else (privacy, summary["privacy_assumptions"]),
        remarks=_SIDE_REMARKS if settings.method == "side" else (),
    )
    write_json(settings.run / SUMMARY_FILE, summary)
    return summary


def _most(*values: int | None) -> int | None:
    return max((value for value in values if value is not None), default=None)


def _earlier_peak(run: Path) -> int | None:
    path = run / SUMMARY_FILE
    if not path.is_file():
        return None
    try:
        earlier = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        # Not as it was written; the run goes on without it.
        return None
    peak = earlier.get("peak_bytes") if isinstance(earlier, dict) else None
    return peak if isinstance(peak, int) else None


def _predicted(backbone: Backbone, settings: TuneSettings, trained: Trained) -> Predicted | None:
    if settings.dp_epsilon is not None or settings.forward_mode or settings.objective != "nats":
        return None
    sizes: dict[str, Any] = {
        "rank": settings.rank,
        "shared_rank": settings.rank,
        "width": settings.width,
        "num_virtual_tokens": settings.virtual_tokens,
        "base_bits": settings.base_bits,
        "num_directions": settings.directions,
        "num_perturbations": settings.directions,
    }
    return predict_run(
        backbone.model.config.to_dict(),
        settings.method,
        settings.estimator,
        # The last token is predicted, never read.
        Workload(
            batch=min(settings.batch_size, len(trained.texts)),
            length=max(len(text.input_ids) for text in trained.texts) - 1,
            targets=max(len(text.input_ids) - text.first_target for text in trained.texts),
            dtype=settings.dtype,
        ),
        MethodSettings(**{name: size for name, size in sizes.items() if size is not None}),
        has_checkpoints=settings.gradient_checkpointing,
        base_bits=settings.base_bits,
    )

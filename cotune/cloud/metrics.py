"""What a cloud does, in the text format of Prometheus (version 0.0.4)."""

from __future__ import annotations

from collections.abc import Mapping

from cotune.cloud.service import CloudService

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

# name: (type, help)
_KNOWN: dict[str, tuple[str, str]] = {
    "cotune_sessions": ("gauge", "Sessions that are not over, by whether their device is connected."),
    "cotune_connections": ("gauge", "Connections of devices."),
    "cotune_rows": ("gauge", "Sequences that are being generated, plain completions included."),
    "cotune_batch_rows": ("gauge", "Sequences in the last forward pass."),
    "cotune_passes_total": ("counter", "Forward passes."),
    "cotune_abandoned_passes_total": ("counter", "Forward passes given up in the middle."),
    "cotune_row_steps_total": ("counter", "Sequences in all forward passes together."),
    "cotune_prompt_tokens_total": ("counter", "Tokens of prompts that were read."),
    "cotune_wasted_steps_total": ("counter", "Steps whose token was rolled back."),
    "cotune_rollbacks_total": ("counter", "Times that a device's answer changed the text."),
    "cotune_stall_seconds_total": ("counter", "Time that sessions waited for their devices."),
    "cotune_branchings_total": ("counter", "Waits of gated sessions that several tokens bridged side by side."),
    "cotune_branches_kept_total": ("counter", "Of these, those at which one of the tokens was right."),
    "cotune_queue_seconds_total": ("counter", "Time that sequences waited for a forward pass that they wanted."),
    "cotune_busy_seconds_total": ("counter", "Time in forward passes."),
    "cotune_bytes_total": ("counter", "Bytes of frames, by way."),
    "cotune_refusals_total": ("counter", "Requests that were refused, by reason."),
    "cotune_answers_total": ("counter", "Answers of the OpenAI interface, by HTTP status."),
    "cotune_rows_are_independent": ("gauge", "1 where sequences in one forward pass do not disturb each other."),
    "cotune_kv_blocks": ("gauge", "Blocks for keys and values, 0 for no bound."),
    "cotune_kv_blocks_used": ("gauge", "Blocks for keys and values that are set aside."),
    "cotune_draining": ("gauge", "1 while the cloud takes no new sessions."),
}


def render_metrics(service: CloudService) -> str:
    """All numbers of a service."""
    engine, totals = service.engine, service.totals()
    counters = engine.counters
    attached = sum(session.is_attached for session in service.sessions.values())
    running = sum(session.stream.ended is None for session in service.sessions.values())
    values: dict[str, Mapping[str, float] | float] = {
        "cotune_sessions": {'state="connected"': attached, 'state="away"': max(0, running - attached)},
        "cotune_connections": service.num_connections,
        "cotune_rows": engine.num_rows,
        "cotune_batch_rows": counters.last_batch_rows,
        "cotune_passes_total": counters.num_passes,
        "cotune_abandoned_passes_total": counters.num_abandoned,
        "cotune_row_steps_total": counters.num_row_steps,
        "cotune_prompt_tokens_total": counters.num_prompt_tokens,
        "cotune_wasted_steps_total": totals.wasted_steps,
        "cotune_rollbacks_total": totals.rollbacks,
        "cotune_stall_seconds_total": totals.stall_s,
        "cotune_branchings_total": totals.branchings,
        "cotune_branches_kept_total": totals.branches_kept,
        "cotune_queue_seconds_total": counters.queue_s,
        "cotune_busy_seconds_total": counters.busy_s,
        "cotune_bytes_total": {'way="down"': totals.bytes_down, 'way="up"': totals.bytes_up},
        "cotune_refusals_total": {f'reason="{name}"': count for name, count in sorted(totals.refusals.items())},
        "cotune_answers_total": {f'status="{status}"': count for status, count in sorted(totals.answers.items())},
        "cotune_rows_are_independent": int(service.model.backbone.rows_are_independent),
        "cotune_kv_blocks": engine.config.max_blocks or 0,
        "cotune_kv_blocks_used": engine.num_reserved_blocks,
        "cotune_draining": int(service.is_draining),
    }
    lines: list[str] = []
    for name, value in values.items():
        kind, what = _KNOWN[name]
        lines += [f"# HELP {name} {what}", f"# TYPE {name} {kind}"]
        labelled = value if isinstance(value, Mapping) else {"": value}
        lines += [
            f"{name}{{{labels}}} {number:.10g}" if labels else f"{name} {number:.10g}"
            for labels, number in labelled.items()
        ]
    return "\n".join(lines) + "\n"

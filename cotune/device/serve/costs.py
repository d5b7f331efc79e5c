"""What a text costs: while it grows, as the device sees it, and at its end, with what the cloud counted."""

from __future__ import annotations

from dataclasses import dataclass

from cotune.device.runtime import DeviceGeneration
from cotune.generation.request import Decision


@dataclass
class RunningCosts:
    """The counts of a text that grows.

    Attributes:
        waits_for_device: the schedule waits for the device at each position that consults it.
    """

    waits_for_device: bool
    num_tokens: int = 0
    num_consulted: int = 0
    num_changed: int = 0

    def add(self, decision: Decision) -> None:
        """One token more."""
        self.num_tokens += 1
        self.num_consulted += decision.consulted
        self.num_changed += decision.changed

    def so_far(self, *, bytes_down: int, bytes_up: int, seconds: float) -> dict[str, float]:
        """Rates by now. M is what the device can see: positions that were waited for, or rolled back to."""
        trips = self.num_consulted if self.waits_for_device else self.num_changed
        per_token = 1.0 / self.num_tokens
        return {
            "M": round(trips * per_token, 4),
            "consult_rate": round(self.num_consulted * per_token, 4),
            "disagree_rate": round(self.num_changed * per_token, 4),
            "bytes_down": bytes_down,
            "bytes_up": bytes_up,
            "ms_per_token": round(1000 * seconds * per_token, 2),
        }


def metrics(made: DeviceGeneration) -> dict[str, object]:
    """The numbers of a finished text, under the names of `cotune device generate --json`."""
    cloud, decisions = made.cloud, made.decisions
    num_tokens = len(decisions)
    per_token = 1.0 / num_tokens if num_tokens else 0.0
    return {
        "mode": made.options.mode,
        "schedule": made.options.schedule,
        "answer": made.options.answer,
        "seed": made.options.sampling.seed,
        "num_tokens": num_tokens,
        "M": (cloud["num_delayed"] + cloud["num_more_trips"]) * per_token,
        "consult_rate": sum(decision.consulted for decision in decisions) * per_token,
        "disagree_rate": sum(decision.changed for decision in decisions) * per_token,
        "bytes_down": made.bytes_down,
        "bytes_up": made.bytes_up,
        "bytes_down_per_token": made.bytes_down * per_token,
        "bytes_up_per_token": made.bytes_up * per_token,
        "ms_per_token": 1000 * made.wall_s * per_token,
        "cloud_ms_per_token": cloud["cloud_ms"] * per_token,
        "device_ms_per_token": 1000 * made.device_s * per_token,
        "stall_ms_per_token": cloud["stall_ms"] * per_token,
        "tokens_per_s": num_tokens / made.wall_s if made.wall_s > 0 else 0.0,
        "wasted_cloud_steps": int(cloud["num_wasted_steps"]),
        "certificate_misses": made.num_certificate_misses,
        "late": sum(decision.late for decision in decisions),
        "local": sum(decision.local for decision in decisions),
        "drafted": int(cloud["num_drafted"]),
        "drafts_kept": int(cloud["num_drafts_kept"]),
        "num_reconnects": made.num_reconnects,
    }

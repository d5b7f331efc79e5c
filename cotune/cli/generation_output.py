"""From what a device generated to the numbers of `--json`, `metrics.json` and reports."""

from __future__ import annotations

from cotune.device.runtime import DeviceGeneration
from cotune.evaluation.generation_metrics import GenerationMetrics


def measure(generation: DeviceGeneration) -> GenerationMetrics:
    """The metrics of one generation.

    M counts the round trips that delayed the text, per token: positions that the cloud waited for or rolled back
    to, and requests for more logits.
    """
    cloud = generation.cloud
    return GenerationMetrics.from_counts(
        mode=generation.options.mode,
        schedule=generation.options.schedule,
        answer=generation.options.answer,
        seed=generation.options.sampling.seed,
        token_ids=generation.token_ids,
        text=generation.text,
        tokens=generation.pieces,
        sources=["device" if decision.changed else "cloud" for decision in generation.decisions],
        consulted=[decision.consulted for decision in generation.decisions],
        blocking_trips=int(cloud["num_delayed"] + cloud["num_more_trips"]),
        bytes_down=generation.bytes_down,
        bytes_up=generation.bytes_up,
        wasted_cloud_steps=int(cloud["num_wasted_steps"]),
        cloud_s=cloud["cloud_ms"] / 1e3,
        device_s=generation.device_s,
        stall_s=cloud["stall_ms"] / 1e3,
        wall_s=generation.wall_s,
        certificate_misses=generation.num_certificate_misses,
    )

"""From what a device generated to the numbers of `--json`, `metrics.json` and reports."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

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
        sources=[decision.source for decision in generation.decisions],
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
        late=[index for index, decision in enumerate(generation.decisions) if decision.late],
        drafted=int(cloud["num_drafted"]),
        drafts_kept=int(cloud["num_drafts_kept"]),
    )


def measure_beams(generation: DeviceGeneration, decode: Callable[[Sequence[int]], str]) -> dict[str, Any] | None:
    """What a beam search found and how often it asked; None without beams.

    M per step is the share of steps with at least one beam that consults the device (one message each, SPA's M under
    beams), beside 1 - (1 - p)^B, which it would be if the beams' gates were independent; M per token divides the same
    trips by the tokens of the best text.
    """
    counters = generation.beam_counters
    if counters is None:
        return None
    num_beams = generation.options.num_beams
    return {
        "num_beams": num_beams,
        "length_penalty": generation.options.length_penalty,
        "num_steps": counters.num_steps,
        "num_trips": counters.num_trips,
        "M_per_step": counters.trips_per_step,
        "M_per_token": counters.num_trips / max(1, len(generation.decisions)),
        "consult_rate_per_beam": counters.consult_rate,
        "predicted_M_per_step": counters.predicted_trips_per_step(num_beams),
        "texts": [
            {
                "text": decode(beam.token_ids),
                "num_tokens": len(beam.decisions),
                "score": beam.score,
                "log_prob": beam.log_prob,
            }
            for beam in generation.beams
        ],
    }

"""The device process that generates and measures. It never imports PyTorch.

Run as `python -m cotune.cli.demo.measuring FOLDER URL`.
"""

from __future__ import annotations

import resource
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cotune.cli.connection import connector, emulated
from cotune.cli.demo.plan import DemoFolder, DemoPlan
from cotune.cli.demo.processes import say
from cotune.cli.generation_output import measure
from cotune.cli.judging import BASE, base_alone, encode_for, generate_all, judge_likelihood
from cotune.cli.run_folder import write_json
from cotune.data.records import read_examples
from cotune.data.templates import Example
from cotune.device.client import CloudClient
from cotune.device.runtime import Device, DeviceGeneration, GenerationOptions
from cotune.evaluation.generation_metrics import GenerationMetrics, aggregate_generations
from cotune.evaluation.judgement import judge
from cotune.generation.request import ANSWERS, PLAIN_SCHEDULES
from cotune.ledger import EgressLedger
from cotune.plugin import Plugin
from cotune.wire.event_loop import run_coroutine

# The gated modes wait where their gate opens; the others run ahead.
SCHEDULE_OF_MODE = {
    "integration": "optimistic",
    "spa": "blocking",
    "ladder": "blocking",
    "separation": "blocking",
}


async def measure_all(folder: DemoFolder, plan: DemoPlan, url: str) -> dict[str, Any]:
    """Judge every mode on the held-out texts, then generate at several round-trip times."""
    examples = read_examples(folder.heldout)
    with EgressLedger(folder.ledger) as ledger:
        make = connector(url, ledger=ledger, way="spa")
        parallel = Device(Plugin.load(folder.plugin), make)
        serial = Device(Plugin.load(folder.serial_plugin), make)
        async with CloudClient(make) as client:
            quality, texts = await _judge(client, parallel, serial, examples, plan)
        speed = await _speed(folder, plan, url, ledger, _typical_prompts(texts, plan.num_speed_prompts))
        totals = EgressLedger.read(folder.ledger)
    return {
        "quality": quality,
        "texts": texts,
        "speed": speed,
        "num_ledger_entries": len(totals),
        "device_peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }


async def _judge(
    client: CloudClient, parallel: Device, serial: Device, examples: Sequence[Example], plan: DemoPlan
) -> tuple[dict[str, Any], dict[str, Any]]:
    devices = {"integration": parallel, "spa": parallel, "ladder": serial, "separation": serial}
    nats = await judge_likelihood(
        client,
        devices,
        encode_for(client, parallel, examples),
        lambda done, total, note="": say("perplexity of held-out texts", done, total),
    )
    prompts = [example.prompt for example in examples]
    generations: dict[str, list[DeviceGeneration]] = {}
    for mode, device in ((BASE, base_alone(client, parallel)), *devices.items()):
        options = GenerationOptions(
            mode="spa" if mode == BASE else mode,
            schedule=SCHEDULE_OF_MODE.get(mode, "optimistic"),
            max_new_tokens=plan.max_new_tokens,
        )
        generations[mode] = await generate_all(
            client,
            device,
            prompts,
            options,
            lambda done, total, note="", mode=mode: say(f"texts, {mode}", done, total),
        )
    quality = {}
    for mode, made in generations.items():
        judgement = judge(
            [example.target for example in examples],
            predictions=[generation.text for generation in made],
            token_nats=nats[mode].tolist(),
            seed=plan.seed,
        )
        quality[mode] = {**judgement.to_dict(), "generation": _together(made).to_dict()}
    texts = {
        mode: [measure(generation).to_dict() for generation in generations[mode]]
        for mode in (BASE, "integration", "spa")
    }
    return quality, {
        **texts,
        "prompts": prompts,
        "references": [example.target.strip() for example in examples],
    }


async def _speed(
    folder: DemoFolder, plan: DemoPlan, url: str, ledger: EgressLedger, prompts: Sequence[str]
) -> list[dict[str, Any]]:
    plugin = Plugin.load(folder.plugin)
    rows: list[dict[str, Any]] = []
    total = len(plan.rtt_ms) * len(ANSWERS) * len(PLAIN_SCHEDULES)
    for rtt_ms in plan.rtt_ms:
        make = connector(url, ledger=ledger, way="spa", profile=emulated(rtt_ms), seed=plan.seed)
        device = Device(plugin, make)
        async with CloudClient(make) as client:
            for answer in ANSWERS:
                for schedule in PLAIN_SCHEDULES:
                    options = GenerationOptions(schedule=schedule, answer=answer, max_new_tokens=plan.max_new_tokens)
                    made = await generate_all(client, device, prompts, options, lambda done, total, note="": None)
                    rows.append(_speed_row(rtt_ms, made))
                    say("speed", len(rows), total, f"{rtt_ms:.0f} ms, {schedule}, {answer}")
    return rows


def _typical_prompts(texts: dict[str, Any], num: int) -> list[str]:
    """Prompts of longer texts on which the device disagrees about as often as on all of them."""
    made = texts["integration"]
    tokens = sum(generation["num_tokens"] for generation in made)
    mean = sum(generation["disagree_rate"] * generation["num_tokens"] for generation in made) / tokens
    longer = sorted(range(len(made)), key=lambda i: -made[i]["num_tokens"])[: max(num, len(made) // 2)]
    nearest = sorted(longer, key=lambda i: abs(made[i]["disagree_rate"] - mean))[:num]
    return [texts["prompts"][i] for i in nearest]


def _speed_row(rtt_ms: float, made: Sequence[DeviceGeneration]) -> dict[str, Any]:
    together = _together(made)
    num_steps = sum(generation.cloud["num_steps"] for generation in made)
    return {
        "rtt_ms": rtt_ms,
        **together.to_dict(),
        "step_ms": sum(generation.cloud["cloud_ms"] for generation in made) / num_steps,
        "text": [generation.text for generation in made],
    }


def _together(made: Sequence[DeviceGeneration]) -> Any:
    metrics: list[GenerationMetrics] = [measure(generation) for generation in made]
    return aggregate_generations(metrics)


def main() -> None:
    """Entry point of the process."""
    folder = DemoFolder(Path(sys.argv[1]))
    found = run_coroutine(measure_all(folder, DemoPlan.load(folder.plan), sys.argv[2]))
    assert "torch" not in sys.modules
    write_json(folder.result("measuring"), found)


if __name__ == "__main__":
    main()

"""Branching instead of waiting (`cotune cloud --max-branches`): what a wait costs with b tokens side by side.

A gated device behind an emulated network; the gate fires at about half of the positions. Prediction: a wait of a
round trip R costs (1 - h_b) R, where h_b is the share of waits at which one of the b tokens was right, as counted in
the same text. Every b must give the same tokens, or the benchmark fails.
"""

from __future__ import annotations

import argparse
import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measurement import Spread, describe_machine, finish, make_parser
from rich.console import Console
from rich.table import Table
from synthetic_plugin import random_plugin

from cotune.cloud.host import HostConfig, host
from cotune.cloud.hosted import HostedModel
from cotune.cloud.service import ServiceConfig
from cotune.device.client import CloudClient
from cotune.device.runtime import Device, DeviceGeneration, GenerationOptions
from cotune.errors import CotuneError
from cotune.models.backbone import Backbone
from cotune.plugin import Plugin
from cotune.wire.emulator import EmulatedConnection, NetworkProfile
from cotune.wire.event_loop import run_coroutine
from cotune.wire.transport import Connection
from cotune.wire.websocket import connect


@asynccontextmanager
async def serving(backbone: Backbone, max_branches: int) -> AsyncIterator[str]:
    """The URL of a cloud in this process."""
    stop, ready = asyncio.Event(), asyncio.get_running_loop().create_future()
    config = HostConfig(port=0, drain_s=0.0, service=ServiceConfig(max_branches=max_branches))
    # Without stop tokens all texts are equally long.
    hosted = HostedModel.of(backbone)
    hosted = replace(hosted, description=replace(hosted.description, stop_token_ids=()))
    task = asyncio.create_task(host(hosted, config, on_ready=ready.set_result, stop=stop))
    try:
        yield await ready
    finally:
        stop.set()
        await task


async def generate(
    backbone: Backbone, plugin: Plugin, prompts: list[str], max_branches: int, rtt_ms: float, num_tokens: int
) -> list[DeviceGeneration]:
    """One text for each prompt, one after the other."""
    options = GenerationOptions(schedule="gated", max_new_tokens=num_tokens)
    async with serving(backbone, max_branches) as url:

        async def far() -> Connection:
            return EmulatedConnection(await connect(url), NetworkProfile.of_rtt(rtt_ms))

        device = Device(plugin, far)
        async with CloudClient(far) as client:
            return [await device.generate_with(client, prompt, options) for prompt in prompts]


def summarise(made: list[DeviceGeneration]) -> dict[str, float]:
    """Means over all tokens of some texts."""
    num = sum(len(one.token_ids) for one in made)

    def per_token(name: str) -> float:
        return sum(one.cloud[name] for one in made) / num

    branchings = sum(one.cloud["num_branchings"] for one in made)
    return {
        "ms": sum(1e3 * one.wall_s for one in made) / num,
        "stall_ms": per_token("stall_ms"),
        "wasted": per_token("num_wasted_steps"),
        "M": per_token("num_delayed"),
        "branchings": branchings / num,
        "h": sum(one.cloud["num_branches_kept"] for one in made) / max(1.0, branchings),
        "q": sum(decision.changed for one in made for decision in one.decisions) / num,
    }


def measure(args: argparse.Namespace) -> list[dict[str, Any]]:
    """One row for each strength of the side network, round trip and number of branches."""
    backbone = Backbone.from_pretrained(args.model)
    rng = np.random.default_rng(args.seed)
    words = [str(number) for number in rng.integers(10, 10_000, 8)]
    prompts = [f"Write something about {' '.join(words[i : i + 3])}." for i in range(args.prompts)]
    rows = []
    for ratio in args.ratios:
        plugin = random_plugin(backbone, ratio, args.seed)
        for rtt_ms in args.rtt_ms:
            found: dict[int, list[dict[str, float]]] = {b: [] for b in args.branches}
            tokens: list[list[int]] | None = None
            for turn in range(-1, args.repeats):
                for b in args.branches:
                    made = run_coroutine(generate(backbone, plugin, prompts, b, rtt_ms, args.max_new_tokens))
                    tokens = tokens or [one.token_ids for one in made]
                    if tokens != [one.token_ids for one in made]:
                        raise CotuneError(f"{b} branches gave other tokens")
                    if turn >= 0:
                        found[b].append(summarise(made))
            waiting = Spread.of([one["ms"] for one in found[args.branches[0]]]).median
            for b, turns in found.items():
                row = {name: Spread.of([one[name] for one in turns]) for name in turns[0]}
                # What the waits that a branch bridged would have cost.
                saved_ms = row["branchings"].median * row["h"].median * rtt_ms
                rows.append(
                    {"ratio": ratio, "rtt_ms": rtt_ms, "branches": b, "predicted_ms": waiting - saved_ms, **row}
                )
    return rows


def main() -> None:
    """Entry point."""
    parser = make_parser("branching", __doc__ or "", "  python benchmarks/branching.py\n")
    parser.add_argument("--model", default="starter")
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.6, 1.0, 1.5], help="delta over base logits")
    parser.add_argument("--rtt-ms", type=float, nargs="+", default=[10.0, 50.0, 100.0])
    parser.add_argument("--branches", type=int, nargs="+", default=[1, 2, 4], help="the first is compared with")
    parser.add_argument("--prompts", type=int, default=2)
    parser.add_argument("--max-new-tokens", type=int, default=40)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    machine = describe_machine()
    torch.set_num_threads(args.threads)
    rows = measure(args)
    table = Table(title="gated, correction form")
    names = ["q", "h", "ms", "predicted_ms", "stall_ms", "M", "wasted"]
    for name in ("rtt_ms", "branches", *names):
        table.add_column(name)
    for row in rows:
        cells = [row[name].median if isinstance(row[name], Spread) else row[name] for name in names]
        table.add_row(f"{row['rtt_ms']:g}", str(row["branches"]), *(f"{cell:.3g}" for cell in cells))
    Console(width=140).print(table)
    args.model = Path(args.model).name
    finish("branching", args, machine, {"rows": rows}, [])


if __name__ == "__main__":
    main()

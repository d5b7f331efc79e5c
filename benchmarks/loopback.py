"""The service on loopback against the same backbone decoding alone, in the same process, on the same texts.

Alone: plain transformers decoding with a KV cache, argmax only, no taps. Service: this process serves, a device in
another process generates over a WebSocket. Both read the same tokens, so the difference is what cotune adds: taps,
frames, transport, the device, and steps that are thrown away where the device disagrees.

Target: at most 15 % slower per kept token.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from loopback_breakdown import measure_parts
from measurement import Spread, Target, describe_machine, finish, make_parser
from persona import cloud_process, heldout_prompts, load_plugin
from raw_server import raw_server
from synthetic_plugin import random_plugin
from timed_generation import TimedGeneration, Totals
from transformers import DynamicCache, GenerationConfig, PreTrainedModel

from cotune.cloud.host import HostConfig, host
from cotune.cloud.hosted import HostedModel
from cotune.errors import CotuneError
from cotune.generation.request import ANSWERS, SCHEDULES
from cotune.generation.text import TextCodec
from cotune.models.backbone import Backbone
from cotune.plugin import Plugin
from cotune.wire.event_loop import run_coroutine
from cotune.wire.transport import Connection

MOST_SLOWER = 1.15
_LINE_LIMIT = 64 * 1024 * 1024

# (prompt ids, generated ids)
Text = tuple[list[int], list[int]]


def decode_alone(model: PreTrainedModel, texts: Sequence[Text]) -> float:
    """Milliseconds per token of plain greedy decoding; each step reads the text's own token, not the argmax."""
    num_tokens, started_s = 0, time.perf_counter()
    with torch.inference_mode():
        for prompt_ids, generated_ids in texts:
            cache = DynamicCache()
            for token_ids in (prompt_ids, *([token] for token in generated_ids[:-1])):
                logits = model(
                    input_ids=torch.tensor([token_ids]), past_key_values=cache, use_cache=True, logits_to_keep=1
                ).logits
                logits[0, -1].argmax().item()
                num_tokens += 1
    return 1e3 * (time.perf_counter() - started_s) / num_tokens


def generate_alone(model: PreTrainedModel, texts: Sequence[Text]) -> float:
    """Milliseconds per token of transformers' own greedy `generate`, as many tokens as each text has."""
    num_tokens, started_s = 0, time.perf_counter()
    with torch.inference_mode():
        for prompt_ids, generated_ids in texts:
            num = len(generated_ids)
            ids = torch.tensor([prompt_ids])
            config = GenerationConfig(
                max_new_tokens=num, min_new_tokens=num, do_sample=False, eos_token_id=None, pad_token_id=0
            )
            model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config)
            num_tokens += num
    return 1e3 * (time.perf_counter() - started_s) / num_tokens


class DeviceChild:
    """The device process, asked from this event loop."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process

    @classmethod
    @asynccontextmanager
    async def started(cls, plugin: Path, url: str) -> AsyncIterator[DeviceChild]:
        """A device that is told to end with the block."""
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            str(Path(__file__).parent / "device_process.py"),
            str(plugin),
            url,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            limit=_LINE_LIMIT,
        )
        try:
            yield cls(process)
        finally:
            if process.stdin is not None:
                process.stdin.close()
            try:
                await asyncio.wait_for(process.wait(), 10.0)
            except TimeoutError:
                process.kill()
                await process.wait()

    async def ask(self, **command: Any) -> dict[str, Any]:
        """Do one command."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write((json.dumps(command) + "\n").encode())
        await self._process.stdin.drain()
        line = await self._process.stdout.readline()
        if not line:
            raise CotuneError("the device process ended early; it said why above")
        return dict(json.loads(line))

    async def generate(self, prompts: Sequence[str], options: dict[str, Any]) -> list[TimedGeneration]:
        """One generation for each prompt."""
        answer = await self.ask(do="generate", prompts=list(prompts), options=options)
        return [TimedGeneration.from_dict(one) for one in answer["generations"]]


@asynccontextmanager
async def serving(backbone: Backbone) -> AsyncIterator[str]:
    """The URL of the cloud service in this process."""
    stop, ready = asyncio.Event(), asyncio.get_running_loop().create_future()
    config = HostConfig(port=0, drain_s=0.0)
    task = asyncio.create_task(host(HostedModel.of(backbone), config, on_ready=ready.set_result, stop=stop))
    try:
        yield await ready
    finally:
        stop.set()
        await task


@asynccontextmanager
async def echoing(num_bytes: int) -> AsyncIterator[str]:
    """The URL of a server that answers each message with one of `num_bytes` bytes."""

    async def answer(connection: Connection) -> None:
        while True:
            await connection.receive(60.0)
            await connection.send(bytes(num_bytes))

    async with raw_server(answer) as url:
        yield url


async def compare(
    backbone: Backbone,
    child: DeviceChild,
    prompts: Sequence[str],
    prompt_ids: Sequence[list[int]],
    args: argparse.Namespace,
) -> tuple[list[dict[str, Any]], list[Text]]:
    """Alone and each kind of service in turns: alone, a service, alone, the next service, ..."""
    kinds = [(schedule, answer) for schedule in args.schedules for answer in ANSWERS]
    options = {kind: {"schedule": kind[0], "answer": kind[1], "max_new_tokens": args.max_new_tokens} for kind in kinds}
    texts: list[Text] = []
    alone_ms: dict[tuple[str, str], list[float]] = {kind: [] for kind in kinds}
    generate_ms: dict[tuple[str, str], list[float]] = {kind: [] for kind in kinds}
    made: dict[tuple[str, str], list[list[TimedGeneration]]] = {kind: [] for kind in kinds}
    for repeat in range(-1, args.repeats):  # the first turn warms up and finds the texts
        for kind in kinds:
            service = await child.generate(prompts, options[kind])
            token_ids = [one.token_ids for one in service]
            texts = texts or list(zip(prompt_ids, token_ids, strict=True))
            if token_ids != [generated for _, generated in texts]:
                raise CotuneError(f"{kind[0]}, {kind[1]} form gave other tokens")
            alone = decode_alone(backbone.model, texts)
            generated = generate_alone(backbone.model, texts)
            if repeat >= 0:
                made[kind].append(service)
                alone_ms[kind].append(alone)
                generate_ms[kind].append(generated)
        print(f"turn {repeat + 1} of {args.repeats} done, same tokens", flush=True)
    return [_summarise(kind, made[kind], alone_ms[kind], generate_ms[kind]) for kind in kinds], texts


def _summarise(
    kind: tuple[str, str],
    turns: Sequence[Sequence[TimedGeneration]],
    alone_ms: Sequence[float],
    generate_ms: Sequence[float],
) -> dict[str, Any]:
    totals = [Totals.of(texts) for texts in turns]
    service_ms = [1e3 / each.text_tokens_per_s for each in totals]
    row: dict[str, Any] = {"schedule": kind[0], "answer": kind[1]}
    row["alone_ms"] = Spread.of(alone_ms)
    row["service_ms"] = Spread.of(service_ms)
    row["times_alone"] = Spread.of([a / b for a, b in zip(service_ms, alone_ms, strict=True)])
    row["generate_ms"] = Spread.of(generate_ms)
    row["times_generate"] = Spread.of([a / b for a, b in zip(service_ms, generate_ms, strict=True)])
    for name in (
        "step_ms",
        "passes_ms",
        "changed_rate",
        "wasted_rate",
        "delayed_rate",
        "device_ms",
        "stall_ms",
        "certificate_miss_rate",
    ):
        row[name] = Spread.of([getattr(each, name) for each in totals])
    # Everything that was no forward pass.
    row["other_ms"] = Spread.of([ms - each.passes_ms for ms, each in zip(service_ms, totals, strict=True)])
    return row


async def measure(
    backbone: Backbone, plugin: Plugin, plugin_folder: Path, prompts: Sequence[str], args: argparse.Namespace
) -> dict[str, Any]:
    """The comparison, and where the time goes."""
    text = TextCodec(plugin.tokenizer_json)
    prompt_ids = [text.encode_prompt(prompt).tolist() for prompt in prompts]
    async with serving(backbone) as url, DeviceChild.started(plugin_folder, url) as child:
        rows, texts = await compare(backbone, child, prompts, prompt_ids, args)
    # Without anybody connected: this keeps the event loop for longer than a peer would wait.
    parts = await measure_parts(backbone, plugin, texts, runs=args.repeats)
    async with serving(backbone) as url, DeviceChild.started(plugin_folder, url) as child:
        for answer, (num_up, num_down) in parts.pop("message_bytes").items():
            async with echoing(num_down) as echo_url:
                found = await child.ask(do="echo", url=echo_url, num=1000, num_bytes=num_up)
            turns = np.array_split(found["round_trips_ms"][100:], 9)
            parts[f"WebSocket round trip, {answer} form, nothing else running"] = Spread.of(
                [float(np.median(turn)) for turn in turns]
            )
    return {
        "kinds": rows,
        "parts_ms": parts,
        "tokens_of_each_text": [len(generated) for _, generated in texts],
    }


def main() -> None:
    """Entry point."""
    parser = make_parser(
        "loopback",
        "Compare the service on loopback with the same backbone decoding alone in the same process.",
        "  python benchmarks/loopback.py\n"
        "  python benchmarks/loopback.py --model path/to/llama --plugin my-plugin --repeats 9",
    )
    parser.add_argument("--model", default="starter", help="the backbone (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of the backbone (default: %(default)s)")
    parser.add_argument("--plugin", type=Path, help="a plugin for that model; without it one is tuned once")
    parser.add_argument(
        "--work", type=Path, default=Path("runs/benchmarks"), help="keeps the tuned plugin (default: %(default)s)"
    )
    parser.add_argument(
        "--random-plugin", type=float, help="instead of tuning: a random one, its delta so many times the base logits"
    )
    parser.add_argument("--schedules", nargs="+", choices=SCHEDULES, default=["blocking", "gated", "optimistic"])
    parser.add_argument("--prompts", type=int, default=6, help="texts (default: %(default)s)")
    parser.add_argument("--max-new-tokens", type=int, default=200, help="of each text (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=7, help="turns (default: %(default)s)")
    args = parser.parse_args()
    machine = describe_machine()
    torch.set_num_threads(args.threads)
    if args.random_plugin is not None:
        backbone = Backbone.from_pretrained(args.model)
        folder = args.work / "random-plugin"
        plugin = random_plugin(backbone, args.random_plugin, args.seed)
        plugin.save(folder)
    else:
        with cloud_process(args.model, args.threads, args.work / "cloud.log") as url:
            plugin = load_plugin(args.plugin, url, args.work, args.seed)
        backbone = Backbone.from_pretrained(args.model)
        folder = args.plugin or args.work / "persona" / "plugin"
    prompts = heldout_prompts(plugin, args.prompts, args.seed)
    results = run_coroutine(measure(backbone, plugin, folder, prompts, args))
    for row in results["kinds"]:
        print(
            f"{row['schedule']:10s} {row['answer']:10s}  alone {row['alone_ms']!s:24s} ms  service "
            f"{row['service_ms']!s:24s} ms  times {row['times_alone']!s:24s}  over generate "
            f"{row['times_generate'].median:.2f}  q {row['changed_rate'].median:.2f}  "
            f"wasted {row['wasted_rate'].median:.2f}  passes {row['passes_ms'].median:.2f} ms  "
            f"other {row['other_ms'].median:.2f} ms  not proved {row['certificate_miss_rate'].median:.2f}"
        )
    for name, spread in results["parts_ms"].items():
        print(f"  {name:62s} {spread} ms")
    targets = [
        Target(
            what=f"{row['schedule']}, {row['answer']} form, time per token over the backbone alone",
            measured=row["times_alone"].median,
            limit=MOST_SLOWER,
            unit="",
        )
        for row in results["kinds"]
    ]
    args.model = args.model.rstrip("/").rsplit("/", 1)[-1]
    finish("loopback", args, machine, results, targets)


if __name__ == "__main__":
    main()

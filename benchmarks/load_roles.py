"""The three processes of `benchmarks/load.py`: a cloud, a crowd of devices, and plain transformers decoding.

Each is told what to do in JSON lines on its standard input and answers in JSON lines.

    python benchmarks/load_roles.py cloud MODEL THREADS
    python benchmarks/load_roles.py devices PLUGIN URL
    python benchmarks/load_roles.py plain MODEL THREADS
"""

from __future__ import annotations

import asyncio
import json
import os
import resource
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

# Before PyTorch is loaded, as the `cotune` command does.
os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")


def say(**values: Any) -> None:
    """One line of answer."""
    print(json.dumps(values), flush=True)


def peak_mb() -> float:
    """The most memory that this process has held, megabytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6


def cloud(model: str, threads: int) -> None:
    """Host `model` without stop tokens, so that all texts are equally long."""
    import torch

    from cotune.cloud.engine import EngineConfig
    from cotune.cloud.host import HostConfig, host
    from cotune.cloud.hosted import HostedModel
    from cotune.cloud.service import ServiceConfig
    from cotune.models.backbone import Backbone
    from cotune.wire.event_loop import run_coroutine

    torch.set_num_threads(threads)
    backbone = Backbone.from_pretrained(model)
    hosted = HostedModel.of(backbone)
    hosted = replace(hosted, description=replace(hosted.description, stop_token_ids=()))
    service = ServiceConfig(max_sessions=256, max_window=256, engine=EngineConfig(max_batch_rows=64))

    async def serve() -> None:
        asyncio.get_running_loop().add_reader(sys.stdin, lambda: on_line(sys.stdin.readline()))
        await host(hosted, HostConfig(port=0, service=service), on_ready=lambda url: say(url=url), stop=stop)

    stop = asyncio.Event()

    def on_line(line: str) -> None:
        if not line:
            stop.set()
        else:
            say(peak_mb=peak_mb(), cpu_s=time.process_time())

    run_coroutine(serve())


@dataclass
class Text:
    """When one device got its tokens, seconds since it asked."""

    times_s: list[float]
    token_ids: list[int]
    wasted_steps: float
    changed: int


def devices(plugin_path: str, url: str) -> None:
    """Generate on as many devices at once as told, each with a connection of its own."""
    from cotune.device.client import ClientConfig, CloudClient
    from cotune.device.runtime import Device, GenerationOptions
    from cotune.device.stream import DeviceStream
    from cotune.plugin import Plugin
    from cotune.wire.emulator import EmulatedConnection, NetworkProfile
    from cotune.wire.event_loop import run_coroutine
    from cotune.wire.transport import Connection
    from cotune.wire.websocket import connect

    device = Device(Plugin.load(Path(plugin_path)), lambda: connect(url))

    async def run_one(prompt: str, rtt_ms: float, options: GenerationOptions) -> Text:
        async def connector() -> Connection:
            return EmulatedConnection(await connect(url), NetworkProfile.of_rtt(rtt_ms))

        async with CloudClient(connector, ClientConfig(timeout_s=300.0)) as client:
            stream = DeviceStream(
                device.request_for(prompt, options, ()),
                device.personal,
                tap_shape=(client.description.num_taps, client.description.tap_dim),
                schedule=options.schedule,
                answer=options.answer,
                window=options.window,
            )
            started_s, times_s = time.perf_counter(), list[float]()
            await client.generate(stream, lambda decision: times_s.append(time.perf_counter() - started_s))
            assert stream.cloud_counters is not None
            return Text(
                times_s,
                stream.token_ids,
                float(str(stream.cloud_counters["num_wasted_steps"])),
                sum(d.changed for d in stream.decisions),
            )

    async def run_all(prompts: Sequence[str], rtt_ms: float, options: GenerationOptions) -> dict[str, Any]:
        started_s, cpu_s = time.perf_counter(), time.process_time()
        texts = await asyncio.gather(*(run_one(prompt, rtt_ms, options) for prompt in prompts))
        wall_s = time.perf_counter() - started_s
        gaps_s = np.concatenate([np.diff(text.times_s) for text in texts])
        first_s = np.array([text.times_s[0] for text in texts])
        rates = np.array([len(text.times_s) / text.times_s[-1] for text in texts])
        num_tokens = sum(len(text.token_ids) for text in texts)
        return {
            "wall_s": wall_s,
            "tokens_per_s": num_tokens / wall_s,
            "first_token_ms": np.percentile(1e3 * first_s, [50, 99]).tolist(),
            "gap_ms": np.percentile(1e3 * gaps_s, [50, 99]).tolist(),
            # Jain's index: 1 where all devices are equally fast, 1/n where one has it all.
            "fairness": float(rates.sum() ** 2 / (len(rates) * (rates**2).sum())),
            "wasted_per_token": sum(text.wasted_steps for text in texts) / num_tokens,
            "changed_rate": sum(text.changed for text in texts) / num_tokens,
            "device_cpu_share": (time.process_time() - cpu_s) / wall_s,
            "peak_mb": peak_mb(),
            "token_ids": [text.token_ids for text in texts],
        }

    say(ready=True)
    for line in sys.stdin:
        order = json.loads(line)
        options = GenerationOptions(**order["options"])
        say(**run_coroutine(run_all(order["prompts"], order["rtt_ms"], options)))


def plain(model: str, threads: int) -> None:
    """transformers' own `generate` on a batch of the same prompts, and its continuous batching where it works."""
    import torch
    from transformers import GenerationConfig

    from cotune.models.backbone import Backbone

    torch.set_num_threads(threads)
    backbone = Backbone.from_pretrained(model)
    say(ready=True)
    for line in sys.stdin:
        order = json.loads(line)
        prompts, num = order["prompt_ids"], order["max_new_tokens"]
        width = max(map(len, prompts))
        pad = backbone.spec.pad_token_id
        ids = torch.tensor([[pad] * (width - len(prompt)) + prompt for prompt in prompts])
        mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        config = GenerationConfig(
            max_new_tokens=num, min_new_tokens=num, do_sample=False, pad_token_id=pad, eos_token_id=None, use_cache=True
        )
        started_s = time.perf_counter()
        if order["continuous"]:
            outputs = backbone.model.generate_batch(inputs=prompts, generation_config=config, progress_bar=False)
            made = sum(len(one.generated_tokens) for one in outputs.values())
        else:
            with torch.inference_mode():
                made = (
                    backbone.model.generate(ids, attention_mask=mask, generation_config=config).shape[1] - width
                ) * len(prompts)
        wall_s = time.perf_counter() - started_s
        say(wall_s=wall_s, tokens_per_s=made / wall_s, num_tokens=made, peak_mb=peak_mb())


if __name__ == "__main__":
    role, *arguments = sys.argv[1:]
    if role == "cloud":
        cloud(arguments[0], int(arguments[1]))
    elif role == "devices":
        devices(*arguments)
    else:
        plain(arguments[0], int(arguments[1]))
